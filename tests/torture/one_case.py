"""One case, in a process of the pool of __main__."""

import contextlib
import importlib
import io
import os
import shutil
import time
import traceback


def run(name, number, seed, folder, keep, deadline):
    """Why a case failed, "" if it passed, None if it was not begun."""
    if time.monotonic() > deadline:
        return None
    own, output = folder / f"case_{number:04d}", io.StringIO()
    own.mkdir()
    with open(folder / f"stderr_{number:04d}", "wb") as log:
        os.dup2(log.fileno(), 2)  # for what libraries in C print
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            importlib.import_module(f"tests.torture.{name}").case(number, seed, own)
        return ""
    except AssertionError as error:
        return str(error) or traceback.format_exc()
    except Exception:
        return f"{traceback.format_exc()}{output.getvalue()[-2000:]}"
    finally:
        if not keep:
            shutil.rmtree(own, ignore_errors=True)
