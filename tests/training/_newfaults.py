import sys
import tempfile
from pathlib import Path

from tests.training.faults import FAULTS, draw_scenes, table, try_faults

kinds = [
    k
    for k in FAULTS
    if any(
        w in k
        for w in ("stopped (SIG", "paused", "at once", "output folder", "clock", "/dev/shm", "further open", "ulimit")
    )
]
with tempfile.TemporaryDirectory() as n:
    f = Path(n)
    out = try_faults(kinds, int(sys.argv[1]), draw_scenes(f), f, jobs=2)
print(table(out))
for k, o in out.items():
    for w in o.wrong:
        print("\n", k, ":\n", w)
