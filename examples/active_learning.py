"""Active learning on digits of which seven are rare: labels are asked for where samples of the posterior disagree most.

python examples/active_learning.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from ivon_kernels import IVON

images, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
x = images.float() / 16
torch.manual_seed(0)
test, rest = torch.randperm(len(x)).split([600, len(x) - 600])
pool = torch.cat([rest[y[rest] == digit][: 120 if digit < 3 else 15] for digit in range(10)])
pool = pool[torch.randperm(len(pool))]
accuracy = []
for by_doubt in (False, True):
    chosen = pool[:20]
    for _ in range(9):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = IVON(model.parameters(), lr=0.3, ess=30 * len(chosen), hess_init=0.05, beta2=0.99, seed=1)
        for _ in range(150):
            optimizer.train()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        posterior = optimizer.posterior(model)
        found = posterior.predict(model, (x[test], y[test]), samples=20)
        left = pool[~torch.isin(pool, chosen)]
        doubt = posterior.predict(model, x[left], samples=20).mutual_information
        chosen = torch.cat([chosen, left[doubt.topk(10).indices if by_doubt else slice(10)]])
    accuracy.append(found.scores().accuracy)
print(f"accuracy with 100 labels, by chance and by doubt {accuracy[0]:.3f} -> {accuracy[1]:.3f}")
