"""Stop signals: finish the step, save, exit."""

import os
import signal
import threading


class StopSignals:
    """SIGTERM and SIGINT set `requested` and let the loop come to its end; a second one raises KeyboardInterrupt.

    with StopSignals() as stop: ... `if stop.requested: save and break`, then `raise SystemExit(stop.exit_code)`.
    Under torchrun ask `run.any(stop.requested)`: processes see a signal at different steps.
    """

    def __init__(self):
        self.requested = False
        self.signal = None  # the first that came
        self._former = {}
        self._process = os.getpid()

    @property
    def exit_code(self):
        """143 after SIGTERM, 130 after SIGINT, 0 without a signal."""
        return 128 + self.signal if self.requested else 0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _handle(self, number, frame):
        if os.getpid() != self._process:
            return  # a forked loader worker: Ctrl-C reaches it too, but its batches are still wanted
        name = signal.Signals(number).name
        if self.requested:
            raise KeyboardInterrupt(f"second signal, {name}")
        self.requested, self.signal = True, int(number)
        # os.write, for print is not safe inside a handler that may have interrupted a print
        os.write(2, f"\n{name}: finishing the step, then saving; once more quits at once\n".encode())
