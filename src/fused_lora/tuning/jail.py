"""A process for candidates that may crash, hang or scribble over memory, and what is said of them then."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

_START_S = 300.0  # for importing PyTorch from a slow disk


class Jail:
    """A worker process (`worker.serve`), started when it is first asked, and again after it has gone.

    Args:
        device, threads: of `worker.serve`.
        setup: Python code that the process runs first.
    """

    def __init__(self, device: str, threads: int, setup: str = ""):
        serving = f"from fused_lora.tuning.worker import serve; serve({device!r}, {threads})"
        self._command = [sys.executable, "-c", f"{setup}\n{serving}"]
        self._process: subprocess.Popen | None = None
        self._rest = b""

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The worker's answer; or {"fault": "crashed" | "hung", "why"}, after which the next question starts another
        process. That process is new after every fault: who knows what it has left behind."""
        if self._process is None:
            self._start()
            answer = self._answer(_START_S)
            if "fault" in answer:
                self.close()
                raise OSError(f"the process that tries candidates did not start: {answer['why']}")
        process: Any = self._process
        with suppress(BrokenPipeError):  # it has died since; the answer says how
            process.stdin.write(json.dumps(request | dict(limit_s=limit_s)).encode() + b"\n")
            process.stdin.flush()
        answer = self._answer(limit_s)
        if "fault" in answer:
            self.close()
        return answer

    def _start(self) -> None:
        environment = os.environ | dict(FUSED_LORA_TUNED="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest = b""
        # A session of its own: the terminal's Ctrl-C is for this side, which ends the other.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
        )

    def _answer(self, limit_s: float) -> dict[str, Any]:
        process: Any = self._process
        end = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return dict(fault="hung", why=f"no answer within {limit_s:g} s")
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                return dict(fault="crashed", why=self._last_words(process.wait()))
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _last_words(self, code: int) -> str:
        if code < 0:
            return f"signal {-code} ({signal.strsignal(-code)})"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"exit code {code}" + (f": {lines[-1][:400]}" if lines else "")

    def close(self) -> None:
        """End the process, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._errors.close()
            self._process = None
