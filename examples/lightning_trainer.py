"""Lightning: IVON in configure_optimizers and one callback; accumulation and mixed precision as usual."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ivon_kernels import IVON
from ivon_kernels.integrations.lightning import IVONCallback


class Classifier(LightningModule):
    """Tells whether a point lies in the unit circle."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:  # at the mean
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> IVON:
        return IVON(self.parameters(), lr=1.0, ess=2000, hess_init=0.1, clip_radius=1.0)


points = 1.2 * torch.randn(2000, 2, generator=torch.manual_seed(0))
data = DataLoader(TensorDataset(points, (points.square().sum(1) < 1).long()), batch_size=100, shuffle=True)
trainer = Trainer(
    max_epochs=20,
    accumulate_grad_batches=2,
    precision="bf16-mixed",
    callbacks=[IVONCallback()],
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(Classifier(), data, data)
print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}")
