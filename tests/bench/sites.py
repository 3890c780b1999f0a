"""Evaluates the measurements of `tests/bench/sites`.

    sites.py well < LIST      the number of processes of `baton list -o json` that finished with exit 0
    sites.py samples FILE     the number of samples, and the maximum of each value
    sites.py files FILE       the table of times, and the promises about them; exit code 1 if one is broken
"""

import json
import statistics
import sys
from pathlib import Path

# The tools that Baton is promised not to be slower than, by measurement.
AGAINST = {"small": ["scp -r", "tar | ssh"], "large": ["scp -r"]}
WHAT = {"small": "1,000 files of 10 KB", "large": "one file of 1 GiB"}
WAY = {"to": "to the site", "back": "back from it"}


def well():
    print(sum(row["state"] == "finished" and row["exit"] == 0 for row in json.load(sys.stdin)))


def samples(path):
    rows = [[int(word) for word in line.split()] for line in Path(path).read_text().splitlines()]
    # The last line was cut when sampling ended.
    rows = [row for row in rows if len(row) == 6]
    first = 0
    logins = rows[0][2]
    for row in rows:
        while row[0] - rows[first][0] > 60_000:
            first += 1
        # An event between two samples counts for both.
        before = rows[first - 1][2] if first else 0
        logins = max(logins, row[2] - before)
    most = [max(row[idx] for row in rows) for idx in range(6)]
    print(len(rows), most[1], logins, most[3], most[4], most[5])


def files(path):
    times, loads = {}, {}
    for line in Path(path).read_text().splitlines():
        what, by, took, load = line.split("\t")
        times.setdefault((what, by), []).append(int(took) / 1000)
        loads.setdefault((what, by), []).append(float(load))
    print(f"      {'':36} {'':16} {'median':>8}  runs, in seconds")
    for (what, by), runs in times.items():
        size, _, way = what.partition(" ")
        text = f"{WHAT[size]} {WAY.get(way, '')}".strip() if size in WHAT else "a login"
        all_runs = " ".join(f"{run:.3f}" for run in runs)
        load = loads[what, by]
        print(f"      {text:36} {by:16} {statistics.median(runs):8.3f}  {all_runs}  (load {min(load)} to {max(load)})")
    is_broken = False
    login = statistics.median(times["login", "ssh"])
    for size, others in AGAINST.items():
        for way, baton in (("to", "baton in:"), ("back", "baton out:")):
            ours = statistics.median(times[f"{size} {way}", baton])
            for other in others:
                theirs = statistics.median(times[f"{size} {way}", other])
                word = "PASS" if ours <= theirs else "FAIL"
                is_broken |= ours > theirs
                text = f"{WHAT[size]} {WAY[way]} by `{baton}` not slower than {other}"
                print(f"{word:5} {text}: {ours:.3f} s, {theirs:.3f} s, without its login {theirs - login:.3f} s")
    sys.exit(is_broken)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"well": well, "samples": samples, "files": files}[command](*arguments)
