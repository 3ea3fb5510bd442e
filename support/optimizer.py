"""AdamW on fp32 masters, its state shared out over the ranks."""

import torch
from torch import Tensor

from support import distributed


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) whose state, 8 or 12 bytes a parameter, each rank keeps for its share only.

    Weights of 16 bits get fp32 *masters*, which take the step and are then rounded: at lr 1e-6 a step is far below what
    bf16 can tell apart, and without masters nearly all of it is lost. fp32 weights are their own masters. Whatever the
    number of ranks, the parameters come out bit for bit the same. With `offload` the state lives in host memory and
    visits the device parameter by parameter.
    """

    def __init__(self, named_parameters, *, lr: float, weight_decay: float, offload: bool = False):
        """named_parameters: (name, parameter) pairs; the state is saved and restored by these names."""
        self.named, self.steps = dict(named_parameters), 0
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__(list(self.named.values()), defaults)
        self.owners = owners([p.numel() for p in self.named.values()], distributed.size())
        for parameter in self.own().values():
            weights = parameter.detach().float()
            state = {"exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.zeros_like(weights)}
            if parameter.dtype != torch.float32:
                state["master"] = weights
            self.state[parameter] = {name: distributed.to_host(x) for name, x in state.items()} if offload else state

    def own(self) -> dict[str, Tensor]:
        """This rank's share of the parameters, by name."""
        return {name: p for (name, p), owner in zip(self.named.items(), self.owners) if owner == distributed.rank()}

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        self.steps += 1
        for parameter in self.own().values():
            kept = self.state[parameter]
            here = {name: distributed.visit(x, parameter.device) for name, x in kept.items()}
            master = here.get("master", parameter)
            adamw(master, parameter.grad.float(), here["exp_avg"], here["exp_avg_sq"], self.steps, group)
            for name, x in kept.items():
                if x is not here[name]:
                    x.copy_(here[name], non_blocking=True)
            if master is not parameter:
                parameter.copy_(master)  # rounds
        for parameter, owner in zip(self.named.values(), self.owners):
            distributed.broadcast(parameter, owner)

    def shard(self) -> dict:
        """This rank's share, to be saved."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what was copied to the host last has come
        return {"steps": self.steps, "state": {name: self.state[p] for name, p in self.own().items()}}

    @torch.no_grad()
    def load_shards(self, shards: list[dict]) -> None:
        """Takes this rank's share from what ranks saved, however many they were.

        Raises KeyError with the name of a parameter that is missing, has masters where there are none now, or the
        other way round, is of another shape or not finite; or that is not of this model.

        Not `load_state_dict`: that casts masters to the type of their weights.
        """
        self.steps = shards[0]["steps"]
        saved = {name: state for shard in shards for name, state in shard["state"].items()}
        for name in saved.keys() - self.named.keys():
            raise KeyError(name)
        for name, parameter in self.own().items():
            if saved.get(name, {}).keys() != self.state[parameter].keys():
                raise KeyError(name)
            for key, x in self.state[parameter].items():
                if saved[name][key].shape != x.shape or not saved[name][key].isfinite().all():
                    raise KeyError(name)
                x.copy_(saved[name][key])


def adamw(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: dict) -> None:
    """One step of torch.optim.AdamW, in place and in its order of operations; all fp32, of one shape."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    p.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    p.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def owners(sizes: list[int], ranks: int) -> list[int]:
    """A rank for each parameter: the largest first, each to the rank that has least."""
    load, chosen = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        chosen[i] = load.index(min(load))
        load[chosen[i]] += sizes[i]
    return chosen
