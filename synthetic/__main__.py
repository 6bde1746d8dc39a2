"""python -m synthetic: see synthetic/__init__.py."""

import sys

from synthetic import main
from utils.errors import UserError

try:
    main()
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
