"""Files that the system is asked for before they are needed, so that the disk works while something else does.

What is asked for is read into the page cache and costs no memory of the process. Systems that have no such call (macOS,
Windows) read ahead by themselves, and nothing is asked of them.
"""

import os

# So much is asked for before it is needed, and so much of that in one call.
_AHEAD, _AT_ONCE = 8 << 20, 1 << 20


class Ahead:
    """Asks for a range of an open file, some of it at a time.

    Args:
        descriptor: The file's.
        start: Where the range begins.
        end: And ends.
    """

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        """Ask for nothing yet."""
        self.end = end
        self._descriptor, self._asked = descriptor, start

    def ask(self, position: int) -> None:
        """Ask for what follows a position."""
        while self._asked < min(self.end, position + _AHEAD) and hasattr(os, "posix_fadvise"):
            size = min(_AT_ONCE, self.end - self._asked)
            os.posix_fadvise(self._descriptor, self._asked, size, os.POSIX_FADV_WILLNEED)
            self._asked += size
