"""``python -m geofm.pretrain`` and ``torchrun … -m geofm.pretrain``: ``geofm pretrain``."""

import sys

from geofm.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
