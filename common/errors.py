"""What goes wrong because of what the user gave us: one clear sentence and exit code 2, no traceback."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Its text says what is wrong, where, and what to do."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the program with exit code 2 after one sentence on stderr; a full disk and denied writes count too."""
    try:
        yield
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        message = f"{error.filename or 'a file'}: {os.strerror(error.errno)}; what was saved before is complete."
    else:
        return
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
