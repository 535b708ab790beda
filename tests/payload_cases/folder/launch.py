"""`python -W` with these arguments: `achilles.local` starts scripts alone, and no `-m`."""

import subprocess
import sys

sys.exit(subprocess.run([sys.executable, "-W", sys.argv[1], *sys.argv[2:]]).returncode)
