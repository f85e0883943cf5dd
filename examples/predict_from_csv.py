"""Where must linear scaling fail? From another trainer's log of step, G and N: python examples/predict_from_csv.py"""

import tempfile
from pathlib import Path

import numpy as np

from svag_fast.analysis.prediction import from_csv

rng = np.random.default_rng(0)
log = Path(tempfile.mkdtemp()) / "log.csv"  # yours: a line for each measurement
G, N, R = rng.normal(0.02, 0.004, 400), rng.normal(0.5, 0.05, 400), rng.normal(26.0, 0.01, 400)
rows = [f"{10 * i},{G[i]},{N[i]},{R[i]}" for i in range(400)]
log.write_text("\n".join(["step,G,N,R", *rows]) + "\n")

prediction = from_csv(log, batch_size=64, lr=0.1, weight_decay=1e-3)
for sentence in prediction.sentences():
    print(sentence)
