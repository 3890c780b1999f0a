"""Prints the reports of `baton bench` in a folder as the tables of RESULTS.md."""

import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

folder = Path(sys.argv[1])
reports = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def revision():
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


def share(number):
    return "" if number is None else f"{100 * number:.0f} %"


limits = reports["limits"]["limits"]
versions = [finding["text"] for finding in reports["doctor"] if finding["what"] in ("broker", "database")]

print(f"{date.today()}, revision {revision()}; {os.cpu_count()} × {model()}, Linux {platform.release()};")
print("; ".join(text.split(",")[0] for text in versions) + ". Everything on this one machine, `tests/bench/run`.")
print()
print("| limit | | by |\n|---|---|---|")
print(f"| messages published, confirmed, delivered, acknowledged | {limits['messages_per_s']:,.0f}/s | {limits['messages_by']} |")
print(f"| rows changed by fenced updates | {limits['rows_per_s']:,.0f}/s | {limits['rows_by']} |")
print(f"| messages and rows together, processes | {limits['combined_per_s']:,.0f}/s | {limits['combined_by']} |")
of_ten = reports["advances"]["limits"]
print(f"| the same with {of_ten['combined_steps']} advances each | {of_ten['combined_per_s']:,.0f}/s | {of_ten['combined_by']} |")
print(f"| single commits | {limits['commits_per_s']:,.0f}/s | {limits['commit_ms']:.2f} ms each |")
of_one = [f"{reports['latency']['limits'][f'{step}_ms']:.2f}" for step in ("accept", "confirm", "claim", "end")]
print(f"| one process alone: accept, confirm, claim, end, in turns with those of Baton | | {', '.join(of_one)} ms |")
print()
# Each is compared with the limits of its own run.
print("| Baton | rate | of messages | of both together | its rows, of rows |\n|---|---|---|---|---|")
for name, text in (
    ("throughput1", "processes of one advance, 1 worker"),
    ("throughput3", "the same, 3 workers"),
    ("advances", "durable advances, 10 a process, 1 worker"),
):
    report = reports[name]
    ratios = report["ratios"]
    cells = [share(ratios.get(key)) for key in ("messages_per_s", "combined_per_s", "rows_per_s")]
    print(f"| {text} | {report['rate_per_s']:,.0f}/s | " + " | ".join(cells) + " |")
ratios = reports["advances"]["ratios"]
rows, most = ratios["rows_per_s"], ratios["rows_per_s"] / ratios["combined_per_s"]
print()
print(f"Advances alone are {share(ratios['advances_to_rows_per_s'])} of the rows that fenced updates change. The rows of the plain loop over messages")
print(f"and rows of such processes, which does nothing else, are {share(most)}; those of Baton, {share(rows)}.")
# Both limits use all processors, so work that needs both takes the sum of their times.
n_rows = reports["advances"]["per_process"]["rows"]
message_in_rows = of_ten["rows_per_s"] / of_ten["messages_per_s"]
free = 1 / (n_rows + message_in_rows)
print(f"If such a process cost nothing but its message and its {n_rows:.0f} rows, each at the rate of its limit, then its ten advances")
print(f"would be {share(10 * free)}, and its rows {share(n_rows * free)}.")
print()
print("| time | median | 99 % |\n|---|---|---|")
latency, control, recover = (reports[name]["times_ms"] for name in ("latency", "control", "recover"))
one = latency["submitted_to_ended"]
ratio = reports["latency"]["ratios"]["three_commits_and_a_confirm"]
print(f"| one process, submitted to ended ({ratio:.2f} × its commits and confirm) | {one['p50']:.1f} ms | {one['p99']:.1f} ms |")
print(f"| pause of one among 1,000 live | {control['rpc_pause']['p50']:.1f} ms | {control['rpc_pause']['p99']:.1f} ms |")
print(f"| play of one among 1,000 live | {control['rpc_play']['p50']:.1f} ms | {control['rpc_play']['p99']:.1f} ms |")
print(f"| pause of all 1,000, until the last is paused | {control['broadcast_pause']['max']:.0f} ms | |")
print(f"| play of all 1,000, until the last is held again | {control['broadcast_play']['max']:.0f} ms | |")
print(f"| a worker is killed, until others hold what it held | {recover['killed_to_held']['max']:.0f} ms | |")
print()
print("| a process costs | in a crowd (throughput) | alone (latency) |\n|---|---|---|")
crowd, alone = reports["throughput1"], reports["latency"]
for key, text in (
    ("commits", "commits"),
    ("rows", "rows written"),
    ("wal_bytes", "bytes of write-ahead log"),
    ("confirms", "task messages, confirmed"),
    ("message_bytes", "bytes of their bodies"),
    ("ack_frames", "acknowledgement frames"),
    ("event_messages", "messages about its state"),
):
    cells = [report["per_process"].get(key) for report in (crowd, alone)]
    print(f"| {text} | " + " | ".join("" if cell is None else f"{cell:,.3g}" if cell < 100 else f"{cell:,.0f}" for cell in cells) + " |")
for name in ("client", "workers", "broker", "database"):
    cells = [1e6 * report["cpu_seconds"][name] / report["count"] if report["cpu_seconds"].get(name) is not None else None for report in (crowd, alone)]
    print(f"| µs of processor time, {name} | " + " | ".join("unknown" if cell is None else f"{cell:,.0f}" for cell in cells) + " |")
