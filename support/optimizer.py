"""Implements AdamW with fp32 master weights and a state that is sharded over the ranks."""

import torch
from torch import Tensor

from support.config import require
from support.distributed import World, pinned_copy


class MasterAdamW(torch.optim.Optimizer):
    """Implements AdamW (Loshchilov & Hutter 2019), with the state of this rank's share only.

    The state takes 8 bytes a parameter for fp32 weights and 12 for bf16 weights. bf16 weights get
    fp32 *master* weights, which take the step and are then rounded: at a learning rate of 1e-6 a
    step is smaller than bf16 can represent, and without masters nearly all of it is lost. fp32
    weights are their own masters. After a step every rank broadcasts its share, so all ranks hold
    the same parameters, bit for bit. With `offload` the state is in host memory and comes to the
    device one parameter at a time.
    """

    def __init__(
        self,
        named_parameters,
        world: World,
        *,
        lr: float,
        weight_decay: float,
        offload: bool = False,
    ):
        self.named = dict(named_parameters)
        self.world = world
        self.steps = 0
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__(list(self.named.values()), defaults)
        self.owners = assign_owners([p.numel() for p in self.named.values()], world.size)
        for parameter in self.share().values():
            weights = parameter.detach().float()
            state = {"exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.zeros_like(weights)}
            if parameter.dtype != torch.float32:
                state["master"] = weights
            if offload:
                state = {name: pinned_copy(x) for name, x in state.items()}
            self.state[parameter] = state

    def share(self) -> dict[str, Tensor]:
        """Return this rank's share of the parameters, by name."""
        pairs = zip(self.named.items(), self.owners)
        return {name: parameter for (name, parameter), owner in pairs if owner == self.world.rank}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        self.steps += 1
        for parameter in self.share().values():
            state = self.state[parameter]
            on_device = {
                name: x.to(parameter.device, non_blocking=True) for name, x in state.items()
            }
            master = on_device.get("master", parameter)
            adamw(
                master,
                parameter.grad.float(),
                on_device["exp_avg"],
                on_device["exp_avg_sq"],
                self.steps,
                group,
            )
            for name, x in state.items():
                if x is not on_device[name]:  # offloaded
                    x.copy_(on_device[name], non_blocking=True)
            if master is not parameter:
                parameter.copy_(master)  # rounds to bf16
        for parameter, owner in zip(self.named.values(), self.owners):
            self.world.broadcast(parameter, owner)

    def shard(self) -> dict:
        """Return the state of this rank's share, to be saved."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # wait for copies to host memory
        return {
            "steps": self.steps,
            "state": {name: self.state[p] for name, p in self.share().items()},
        }

    @torch.no_grad()
    def load_shards(self, shards: list[dict]) -> None:
        """Restore this rank's share from the shards of any number of ranks.

        Raises UserError if one does not fit. torch's load_state_dict would cast the masters to the
        type of the weights.
        """
        self.steps = shards[0]["steps"]
        saved = {}
        for shard in shards:
            saved |= shard["state"]
        for name, parameter in self.share().items():
            for key, x in self.state[parameter].items():
                fits = name in saved and key in saved[name] and saved[name][key].shape == x.shape
                require(
                    fits,
                    f"the checkpoint has no {key} for {name}: it was saved with another "
                    "precision= or model",
                )
                x.copy_(saved[name][key])


def adamw(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict
) -> None:
    """Take one AdamW step in place, in torch.optim.AdamW's order of operations.

    All tensors are fp32 and of one shape.
    """
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def assign_owners(sizes: list[int], ranks: int) -> list[int]:
    """Assign each parameter to a rank: the largest first, to the rank with the least so far."""
    load = [0] * ranks
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners
