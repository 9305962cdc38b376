"""What went wrong, in one sentence and one exit code.

| code | what it says |
|---|---|
| 0 | certified, or nothing was asked |
| 1 | violated or inconclusive: a verdict, never an error |
| 2 | bad input: a recipe, a path, a damaged file |
| 3 | the machine: disk, memory, open files, another process |
| 70 | a mistake of curvprune's own |
| 130, 143 | interrupted (Ctrl-C), told to end (SIGTERM) |
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

BAD_INPUT, MACHINE, INTERNAL, INTERRUPTED, ENDED = 2, 3, 70, 130, 143
# Set to anything, it asks for the traceback of a mistake of ours.
TRACEBACK = "CURVPRUNE_TRACEBACK"
MOST_SHOWN = 700  # characters of a sentence

# What a user can mend: recipe, paths, weights that overflow, a library that is not there.
_BAD_INPUT = (ValueError, OSError, ArithmeticError, ImportError, SafetensorError)
# Errors of files that are no fault of the path.
_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EPIPE, errno.ENOLCK),
}
# What torch and safetensors say in plain errors.
_MACHINE_WORDS = re.compile(
    r"DefaultCPUAllocator|not enough memory|can't allocate memory|Cannot allocate memory"
    r"|out of memory|std::bad_alloc|No space left|CUDA error|cuBLAS error|unable to mmap"
    r"|Connection (closed|reset) by peer|Too many open files|can't start new thread",
    re.IGNORECASE,
)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The sentence that a user reads, and the exit code."""

    code: int
    text: str


class Terminated(BaseException):
    """The process was told to end (SIGTERM)."""


def failure_of(error: BaseException, *, resumes: bool = False) -> Failure:
    """What to say of an exception, and how to exit.

    Args:
        resumes: the same command, run again, goes on from where this one stopped.
    """
    again = "run the same command again to go on from here" if resumes else "run it again"
    # 1. The user, or the system, has ended it.
    if isinstance(error, KeyboardInterrupt):
        return Failure(code=INTERRUPTED, text=f"interrupted; {again}")
    if isinstance(error, Terminated):
        return Failure(code=ENDED, text=f"told to end (SIGTERM); {again}")
    # 2. The machine, wherever in the chain of causes it shows.
    if is_machine(error):
        remedy = f"make room and {again}" if _is_room(error) else again
        return Failure(code=MACHINE, text=f"{one_line(_said(error))}; {remedy}")
    # 3. What was passed.
    if isinstance(error, _BAD_INPUT):
        return Failure(code=BAD_INPUT, text=one_line(_said(error)))
    if isinstance(error, RecursionError):
        return Failure(code=BAD_INPUT, text="the input is nested too deeply to be read")
    # 4. Nobody expected this one.
    where = _place(error)
    said = one_line(str(error) or "no message", most=300)
    return Failure(
        code=INTERNAL,
        text=f"internal error: {type(error).__name__} at {where}: {said}; please report it, with "
        f"the traceback that {TRACEBACK}=1 shows",
    )


def tell(error: BaseException, *, resumes: bool = False) -> int:
    """Write what went wrong to the standard error; the exit code. See `failure_of`."""
    failure = failure_of(error, resumes=resumes)
    try:
        if failure.code == INTERNAL and os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(failure.text)}")
    except OSError:
        pass  # there is nobody left to tell
    return failure.code


@contextmanager
def told_to_end() -> Iterator[None]:
    """SIGTERM is an exception meanwhile, as Ctrl-C is: files are left whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_machine(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, is the machine's: a full disk, too little
    memory, too many open files."""
    return any(_is_machine(link) for link in _chain(error))


def _is_machine(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    # RecipeError and the like repeat what they were raised from; that link speaks for itself.
    if isinstance(error, ValueError):
        return False
    said = str(error)
    number = _OS_ERROR.search(said)
    if number is not None and int(number.group(1)) in _OF_THE_MACHINE:
        return True
    foreign = (RuntimeError, SafetensorError, OSError, ImportError)
    return isinstance(error, foreign) and _MACHINE_WORDS.search(said) is not None


def _is_room(error: BaseException) -> bool:
    """Whether there is too little of something that a user can have more of."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in (errno.EPIPE, errno.EAGAIN, errno.EIO):
            return False
        if "by peer" in str(link):
            return False
    return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        yield link
        seen.add(id(link))
        hidden = link.__suppress_context__
        link = link.__cause__ or (None if hidden else link.__context__)


def _said(error: BaseException) -> str:
    """An exception's own words, with the path of a file where it has one."""
    if isinstance(error, MemoryError):
        return str(error) or "there is not enough memory"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error) or type(error).__name__


def one_line(text: str, *, most: int = MOST_SHOWN) -> str:
    """A text without line breaks, cut in the middle where it is too long to read."""
    # Libraries write paragraphs; a value may have megabytes.
    if len(text) > 20 * most:
        text = f"{text[: 10 * most]} … {text[-10 * most :]}"
    words = " ".join(text.split())
    if len(words) <= most:
        return words
    head, tail = 2 * most // 3, most // 3 - 3
    return f"{words[:head]} … {words[-tail:]}"


def _place(error: BaseException) -> str:
    """File and line of ours that an exception came through last."""
    package = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(package)]
    if not ours:
        return "an unknown place"
    last = ours[-1]
    file = os.path.relpath(last.filename, Path(package).parent)
    return f"{file}:{last.lineno}"


# ------------------------------------------------------------ errors of safetensors


def tensors_error(error: Exception, path: str | os.PathLike[str]) -> Exception:
    """What to raise for a file of tensors that could not be read or written: `OSError` with the
    number of the system's error where there is one, else `ValueError` that calls it damaged."""
    number = _OS_ERROR.search(str(error))
    if number is not None:
        code = int(number.group(1))
        return OSError(code, os.strerror(code), str(path))
    if is_machine(error):
        return MemoryError(f"{path}: {one_line(str(error))}")
    return ValueError(f"{path} is damaged ({one_line(str(error), most=200)}); write it again")
