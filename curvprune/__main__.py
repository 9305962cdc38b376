"""The command ``curvprune``, also as ``python -m curvprune``, for ``torchrun -m curvprune``."""

import sys

from curvprune.failures import tell, told_to_end


def main() -> None:
    """Run the command line. torch takes seconds to load, in which one may change one's mind."""
    with told_to_end():
        try:
            from curvprune.cli import app
        except BaseException as error:
            sys.exit(tell(error))
        app()


if __name__ == "__main__":
    main()
