"""Find wrong labels by how much each example moved the model; the worst go to wrong_labels/labels.md. Extra: bench."""

from pathlib import Path

import pandas
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

from ivon_kernels import IVON
from ivon_kernels.posterior import report_labels

data = pandas.read_json(Path(__file__).parents[1] / "benchmarks" / "data" / "vader_amazon.jsonl.gz", lines=True)
votes = torch.tensor(data.votes.tolist())[:, ::2]  # negative, positive
clear = (votes.amax(1) >= 0.6 * torch.tensor(data.votes.map(sum))).nonzero()[:1000, 0]  # on these the raters agree
texts, votes = data.text[clear.numpy()].tolist(), votes[clear]
words = TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
x = torch.tensor(words.toarray(), dtype=torch.float32)
for share in (0.1, 0.2):
    flipped = torch.rand(len(x), generator=torch.manual_seed(0)) < share
    labels, scores = votes.argmax(1) ^ flipped.long(), {}
    for kind in ("AdamW", "IVON"):
        model = torch.nn.Linear(x.shape[1], 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if kind == "IVON":
            optimizer = IVON(model.parameters(), lr=3.0, ess=len(x), beta2=0.999, weight_decay=1e-3, seed=0)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
        for batch in [batch for _ in range(15) for batch in torch.randperm(len(x)).split(50)]:
            with optimizer.sampled_params(train=True) if kind == "IVON" else torch.enable_grad():
                cross_entropy(model(x[batch]), labels[batch]).backward()
            [step() for step in (optimizer.step, optimizer.zero_grad, decay.step)]
        scores[f"{kind}'s loss"] = cross_entropy(model(x), labels, reduction="none").detach()
    scores["raters' votes"] = -votes.gather(1, labels[:, None])[:, 0]
    scores["sensitivity"] = optimizer.posterior(model).sensitivity(model, (x, labels))
    for name, score in scores.items():
        found = flipped[score.argsort(descending=True)[: flipped.sum()]].double().mean()
        print(f"{share:.0%} flipped, by {name}: AUROC {roc_auc_score(flipped, score):.3f}, precision {found:.2f}")
left_out = optimizer.posterior(model).leave_one_out(model, (x, labels))
report_labels("wrong_labels", score, left_out, texts, classes=["negative", "positive"], votes=votes)
