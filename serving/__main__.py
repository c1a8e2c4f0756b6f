"""``python -m serving`` is the `rigserve` command."""

import sys

from serving.cli import main

sys.exit(main())
