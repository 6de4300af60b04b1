"""What every test run needs, and the traps of nbval, solved once.

- nbval waits a cell's whole time limit for a kernel that has died; here a dead kernel ends the wait at once.
- nbval compares text only. Pictures are asserted through their data in the lesson, so PNG bytes are left alone.
- nbval compares an output or ignores it; of a cell with the tag `timing` it compares all but the numbers here.
"""

import os
import re
import time
from queue import Empty

# Tests and lessons read no network and draw no window; progress bars would be outputs that never repeat.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["PYTHONHASHSEED"] = "0"
# transformers loads tqdm, which in a kernel without ipywidgets warns on standard error, where no output is expected.
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")


def pytest_configure(config):
    if not getattr(config.option, "nbval", False):
        return
    os.environ.pop("MPLBACKEND", None)  # a kernel draws inline
    from nbval.kernel import RunningKernel
    from nbval.plugin import IPyNbCell

    wait, sanitize = RunningKernel.get_message, IPyNbCell.sanitize

    def get_message(self, stream, timeout=None):
        end = time.monotonic() + (timeout if timeout is not None else float("inf"))
        while True:
            try:
                return wait(self, stream, timeout=max(0.01, min(1.0, end - time.monotonic())))
            except Empty:
                if time.monotonic() >= end or not self.is_alive():
                    raise

    def without_timings(self, text):
        text = sanitize(self, text)
        if "timing" not in self.cell.metadata.get("tags", []) or not isinstance(text, str):
            return text
        return re.sub(r" *(\d[\d.,]*|\bnan\b)", " #", text)  # with the spaces that align it

    RunningKernel.get_message, IPyNbCell.sanitize = get_message, without_timings
