"""Stop signals: finish the step, save, exit."""

import os
import signal
import threading
import time

from training.distributed import Run
from utils import interrupts

SAME_SECONDS = 0.5  # signals closer than this are one: torchrun and `timeout` pass Ctrl-C and SIGTERM on twice


class StopSignals:
    """SIGTERM and SIGINT ask the loop to stop; a second one ends the process at once, see utils.interrupts.quit.

    with StopSignals(run) as stop: ... `if stop.requested(): save and break`, then `raise SystemExit(stop.exit_code)`.
    """

    def __init__(self, run: Run):
        self.run = run
        self.signal = 0  # number of the first signal that any process received; 0 for none
        self._received = None  # when this process received its first
        self._handlers = {}  # those before ours
        self._process = os.getpid()

    def requested(self) -> bool:
        """Whether any process has received a signal. Every process calls it after each step, so that all stop after the
        same one."""
        signal_of_any = self.run.max(self.signal)
        if signal_of_any:  # else leave it alone: a signal may have arrived meanwhile, for the next call
            self.signal = signal_of_any
        return signal_of_any > 0

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, 0 without a signal."""
        return 128 + self.signal if self.signal else 0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
            for number in interrupts.STOP:
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number, frame):
        if os.getpid() != self._process:
            return  # a child that has just been forked
        now = time.monotonic()
        if self._received is None:
            self.signal, self._received = self.signal or int(number), now
            # os.write, because print is not safe inside a handler that may have interrupted a print
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the step, then saving; send it again to quit at once\n".encode())
        elif now - self._received > SAME_SECONDS:
            interrupts.quit(number)
