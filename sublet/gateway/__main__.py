"""`python -m sublet.gateway`: one gateway process, by the orders in its environment."""

import sys

from sublet.gateway.process import main

if __name__ == "__main__":
    sys.exit(main())
