"""Per-sample norms and their peers by CPU time on one thread: for machines that others use as well.

Run: `python bench/sample_norms_table.py preresnet32:3 digits8:200 --contenders plain backpack`. Each step is taken in
turn with ours; the ratio is contender / ours, of the medians. `NET:ROUNDS`, the nets of bench/test_sample_norms.py.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median

import torch
from test_sample_norms import CONTENDERS, NETS, Setting, Step, _peak_mib


def cpu_seconds(step: Step) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="+", metavar="NET:ROUNDS", help=", ".join(NETS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| net | contender | CPU ms | ours, CPU ms | ratio | peak MiB | ours, peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, rounds in (net.split(":") for net in arguments.nets):
        setting = Setting(name)
        torch.set_num_threads(1)
        ours = setting.ours()
        for contender in arguments.contenders:
            target = CONTENDERS[contender](setting)
            target()
            ours()
            pairs = [(cpu_seconds(target), cpu_seconds(ours)) for _ in range(int(rounds))]
            theirs, mine = (median(times) * 1e3 for times in zip(*pairs, strict=True))
            memory = f"{_peak_mib(target):.0f} | {_peak_mib(ours):.0f}"
            print(f"| {name} | {contender} | {theirs:.2f} | {mine:.2f} | {theirs / mine:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
