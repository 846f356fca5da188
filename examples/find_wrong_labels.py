"""Find the wrong labels of training data: rank the examples by how much each has moved the posterior.

Labels of rated sentences are flipped at random. Prints how well each ranking finds them: the area under the ROC curve,
and the share of wrong labels among the first ones, as many as there are. Needs scikit-learn and no network.
"""

import gzip
import json
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from torch import nn

from ivon_kernels import IVON

DATA = Path(__file__).parents[1] / "benchmarks" / "data" / "vader_nyt.jsonl.gz"
rows = [json.loads(line) for line in gzip.open(DATA, "rt", encoding="utf-8")][:1500]
votes = torch.tensor([row["votes"] for row in rows]).double()
x = torch.tensor(TfidfVectorizer(min_df=2).fit_transform([row["text"] for row in rows]).toarray()).float()

for share in (0.1, 0.2):
    torch.manual_seed(0)
    flipped = torch.rand(len(x)) < share
    labels = torch.where(flipped, (votes.argmax(1) + torch.randint(1, 3, (len(x),))) % 3, votes.argmax(1))
    batches = list(zip(x.split(100), labels.split(100), strict=True))
    scores = {}
    for name in ("AdamW", "IVON"):
        model = nn.Linear(x.shape[1], 3)
        if name == "IVON":
            optimizer = IVON(model.parameters(), lr=2.0, ess=len(x), hess_init=0.01, beta2=0.999, weight_decay=1e-4)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for batch, targets in 20 * batches:
            optimizer.train() if name == "IVON" else None
            nn.functional.cross_entropy(model(batch), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        if name == "IVON":
            optimizer.eval()
            posterior = optimizer.posterior(model)
            loo = posterior.leave_one_out(model, batches, samples=0)
            scores["sensitivity"] = posterior.sensitivity(model, batches)
            scores["loo loss"] = -loo.probabilities.log()[torch.arange(len(x)), labels]
        with torch.no_grad():
            p = model(x).softmax(1)
        print(name, "clean acc", (p.argmax(1) == votes.argmax(1)).double().mean(), "acc", (p.argmax(1) == labels).double().mean())
        scores[f"loss of {name}"] = -p.log()[torch.arange(len(x)), labels]
    scores["raters"] = -votes[torch.arange(len(x)), labels] / votes.sum(1)
    for name, score in scores.items():
        first = score.argsort(descending=True)[: int(flipped.sum())]
        print(f"{share:.0%} {name:15s} AUROC {roc_auc_score(flipped, score):.3f} precision {flipped[first].double().mean():.2f}")
