"""Stop signals: finish the step, save, exit."""

import os
import signal
import threading

from training.distributed import Run


class StopSignals:
    """SIGTERM and SIGINT ask the loop to stop; a second one raises KeyboardInterrupt.

    with StopSignals(run) as stop: ... `if stop.requested(): save and break`, then `raise SystemExit(stop.exit_code)`.
    """

    def __init__(self, run: Run):
        self.run = run
        self.signal = 0  # number of the first signal received; 0 for none
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
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number, frame):
        if os.getpid() != self._process:
            return  # a forked worker: Ctrl-C reaches it too, but its batches are still needed
        name = signal.Signals(number).name
        if self.signal:
            raise KeyboardInterrupt(f"second signal, {name}")
        self.signal = int(number)
        # os.write, because print is not safe inside a handler that may have interrupted a print
        os.write(2, f"\n{name}: finishing the step, then saving; send it again to quit at once\n".encode())
