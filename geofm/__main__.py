"""``python -m geofm`` is the ``geofm`` command."""

import sys

from geofm.cli import main

sys.exit(main())
