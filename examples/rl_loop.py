"""A plain reinforcement learning loop (REINFORCE): act under one posterior sample, replay that sample at the update.

python examples/rl_loop.py
"""

import torch
from torch import nn

from ivon_kernels import IVON

STATES, ACTIONS = 8, 4


def main() -> None:
    """Learn which action each state rewards."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Embedding(STATES, 16), nn.Tanh(), nn.Linear(16, ACTIONS))
    optimizer = IVON(policy.parameters(), lr=0.3, ess=1e4, hess_init=0.1, clip_radius=1.0)
    rewards = []
    for round_ in range(200):
        with optimizer.sampled_params(sample=round_), torch.no_grad():  # without sample=: rollouts at the mean
            states = torch.randint(STATES, (64,))
            behaviour = torch.distributions.Categorical(logits=policy(states))
            actions = behaviour.sample()
            old_log_probs = behaviour.log_prob(actions)
        reward = (actions == states % ACTIONS).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        for _ in range(2):  # two updates on the same rollouts, under the sample that made them
            optimizer.train(sample=round_)
            log_probs = torch.distributions.Categorical(logits=policy(states)).log_prob(actions)
            (-(log_probs - old_log_probs).exp() * advantage).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(reward.mean().item())
    print(f"reward {rewards[0]:.2f} -> {sum(rewards[-5:]) / 5:.2f}")


if __name__ == "__main__":
    main()
