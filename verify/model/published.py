"""`python -m verify published --peer PATH`: tvm_ref beside the published code of Terminal Velocity Matching.

PATH is a checkout of lumalabs/tvm, which is called and never copied. With the same random weights and inputs, in
float32: the network's output, both terms of the loss for given t, s and s', and the gradients. A network pickled by the
published code goes through tvm_ref.convert. How weights start and the settings of the four published runs are compared.

An output counts as the published one if both are within one error budget of the same formulas in float64.
"""

import importlib
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashjvp_commands import arguments as types
from flashjvp_commands import outputs, terminal
from flashjvp_commands.ending import FAILED, HELD, UNUSABLE
from flashjvp_commands.entry import program
from reports.environment import now
from reports.schema import write_rows
from tvm_ref import convert
from tvm_ref.data.latents import LATENT_STATISTICS
from tvm_ref.model.dit import DiT, DiTConfig
from tvm_ref.objective import loss, path
from tvm_ref.objective.loss import Terms
from tvm_ref.training.presets import PRESETS

from ..arguments import rows_path
from ..budget.network_tolerance import network_budget, relative_error
from ..oracles.network import network as dense_network
from ..oracles.network import tiny, weights_of
from ..oracles.objectives import dense_terms
from ..run.judge import Run
from . import peer
from .evaluate import Setting, make_setting

NETWORKS = {
    "small": tiny(attention_backend=None),
    "XL/2-18h width": tiny(image_size=8, channels=4, width=1152, heads=18, attention_backend=None),
}
CONFIGS = {
    "imagenet256-w2": "im256_w2",
    "imagenet256-w1.75": "im256_w1p75",
    "imagenet512-w2.5": "im512_w2p5",
    "imagenet512-w2.25": "im512_w2p25",
}
OTHERWISE = {  # weights that the published code initialises in another way than the paper says
    "x_embedder.proj.weight": "published: Xavier-normal, since the quotient by the spectral norm is assigned to a copy"
}
SAME_START = 1e-3  # of norms at initialisation: float32 singular values, by two algorithms


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. Errors are relative Frobenius norms to float64; `difference` is that of the two to each other."""

    check: str
    subject: str
    quantity: str
    error: float | None = None
    published_error: float | None = None
    difference: float | None = None
    budget: float | None = None
    ok: bool
    reason: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


class Line:
    """A row of the CSV: a comparison, then where it was made and with which commit of the peer."""

    def __init__(self, row: Row, columns: dict[str, str]) -> None:
        vars(self).update(vars(row) | columns)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything agreed, 1 when not, 2 where PATH is no checkout or lacks a package."""
    options = types.parser(f"{program('verify')} published", (__doc__ or "").partition(": ")[2])
    options.add_argument("--peer", type=Path, required=True, metavar="PATH", help="a checkout of lumalabs/tvm")
    options.add_argument("--seed", type=types.seed, default=0, metavar="N", help="of all weights and numbers (0)")
    options.add_argument(
        "--out", type=outputs.path_with(".csv.gz", ".csv"), metavar="PATH",
        help=f"for the rows: {outputs.HELP % '.csv.gz or .csv'}; default reports/data/<machine>/published.csv",
    )  # fmt: skip
    given = options.parse_args(arguments)
    console = terminal.console()
    columns = Run.here("cpu", given.seed, now()).columns | {"peer_commit": peer.commit_of(given.peer)}
    try:
        file = rows_path(given.out, "cpu", "published.csv", (*COLUMNS, *columns))
        with peer.with_dense_attention(given.peer) as wrapper:
            rows = [row for name, config in NETWORKS.items() for row in compare(wrapper, name, config, given.seed)]
            rows += initialisation(wrapper, NETWORKS["small"]) + settings(given.peer)
    except (ModuleNotFoundError, outputs.OutputError) as error:
        name = "--out" if isinstance(error, outputs.OutputError) else f"--peer {given.peer}"
        console.print(f"{name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return UNUSABLE
    write_rows(file, [Line(row, columns) for row in rows], (*COLUMNS, *columns))
    for row in rows:
        numbers = "" if row.error is None else f" {row.error:.2e}, published {row.published_error:.2e}, "
        numbers += "" if row.budget is None else f"difference {row.difference:.2e}, budget {row.budget:.2e}"
        text = f"{'ok' if row.ok else 'FAILED'}: {row.check}, {row.subject}: {row.quantity}{numbers} {row.reason}"
        console.print(text, style="" if row.ok else "red", markup=False, highlight=False, soft_wrap=True)
    wrong = sum(not row.ok for row in rows)
    console.print(f"{wrong} of {len(rows)} rows FAILED" if wrong else f"all {len(rows)} rows agree; wrote {file}")
    return FAILED if wrong else HELD


def compare(wrapper: Any, name: str, config: DiTConfig, seed: int) -> list[Row]:
    """Output, terms and gradients in both parameterisations; the weights by way of a pickle that the peer made."""
    setting = make_setting(name, config, "cpu", seed)
    single = setting.to(torch.float32)
    rows = []
    for scaled in (True, False):
        theirs = peer.build(wrapper, config, scaled), peer.build(wrapper, config, scaled)
        for module, network in zip(theirs, (single.network, single.target), strict=True):
            module.model.load_state_dict(network.state_dict(), strict=True)
        subject = f"{name}, {'scaled' if scaled else 'not scaled'}"
        ours = _ours(single, scaled)
        published = _published(theirs, single)
        exact, measured = _dense(setting, scaled), _dense(single, scaled)
        for quantity, tensors in exact.items():
            budget = network_budget(measured[quantity], tensors, torch.float32, torch.float32)
            errors = [relative_error(found[quantity], tensors) for found in (ours, published)]
            difference = relative_error(ours[quantity], published[quantity])
            ok = max(errors) <= budget and difference <= 2 * budget
            rows.append(
                Row(check="same weights", subject=subject, quantity=quantity, error=errors[0],
                    published_error=errors[1], difference=difference, budget=budget, ok=ok)
            )  # fmt: skip
        if scaled:
            rows.append(_converted(theirs[0], single.network, name))
    return rows


def _converted(module: Any, network: DiT, name: str) -> Row:
    """tvm_ref.convert turns the pickle of the published module into weights that load strictly and are the same."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "network.pkl"), Path(folder, "weights.safetensors")
        source.write_bytes(pickle.dumps({"ema": module, "dataset_kwargs": {}}))
        try:
            found = convert.convert(source, target)
        except ValueError as error:
            return Row(check="pickle", subject=name, quantity="converted weights", ok=False, reason=str(error))
        loaded = DiT(found)
        loaded.load_state_dict(load_file(target), strict=True)
    same = all(map(torch.equal, loaded.state_dict().values(), network.state_dict().values()))
    return Row(check="pickle", subject=name, quantity="converted weights", ok=same and found == network.config)


def _ours(setting: Setting, scaled: bool) -> dict[str, list[Tensor]]:
    network, target, _, batch = setting
    x_t = path.point(batch.x0, batch.x1, batch.t)
    output = network(x_t, batch.t, batch.s, batch.labels, 1 / batch.w)
    terms = loss.tvm_loss(network, target, batch, scaled=scaled, detach=False)
    return _quantities(output, terms, list(weights_of(network).values()))


def _published(modules: tuple[Any, Any], setting: Setting) -> dict[str, list[Tensor]]:
    network, target = modules
    output = peer.output(network, setting.batch)
    terms = peer.terms(network, target, setting.batch)
    learned = dict(network.model.named_parameters())
    return _quantities(output, terms, [learned[name] for name in weights_of(setting.network)])


def _dense(setting: Setting, scaled: bool) -> dict[str, list[Tensor]]:
    network, target, _, batch = setting
    x_t = path.point(batch.x0, batch.x1, batch.t)
    weights = weights_of(network)
    output = dense_network(weights, network.config, x_t, batch.t, batch.s, batch.labels, 1 / batch.w)
    return _quantities(output, dense_terms("tvm", network, target, batch, scaled), list(weights.values()))


def _quantities(output: Tensor, terms: Terms, weights: list[Tensor]) -> dict[str, list[Tensor]]:
    learned = [weight for weight in weights if weight.requires_grad]
    gradients = torch.autograd.grad(terms.loss.mean(), learned)
    values = {"output": output, "terminal-velocity term": terms.velocity, "flow-matching term": terms.flow}
    return {name: [value.detach()] for name, value in values.items()} | {"gradients": list(gradients)}


def initialisation(wrapper: Any, config: DiTConfig) -> list[Row]:
    """Every weight starts with the published spectral norm (N(0, 0.02): root mean square), or at the same numbers."""
    rows = []
    for spectral in (False, True):
        torch.manual_seed(0)
        wide = DiTConfig(
            **(vars(config) | {"width": 192, "heads": 3, "num_classes": 500, "spectral_time_mlp": spectral})
        )
        ours = dict(DiT(wide).named_parameters())
        theirs = dict(peer.build(wrapper, wide, True, spectral).model.named_parameters())
        differ = {name for name in ours if not _start_alike(ours[name].detach(), theirs[name].detach())}
        subject = f"time MLPs {'spectral' if spectral else 'N(0, 0.02)'}"
        reason = "; ".join(f"{name} {OTHERWISE.get(name, 'differs')}" for name in sorted(differ))
        same = ours.keys() == theirs.keys() and differ == OTHERWISE.keys()
        rows.append(Row(check="start", subject=subject, quantity=f"{len(ours)} tensors", ok=same, reason=reason))
    return rows


def _start_alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if torch.equal(one, other):  # zeros, ones, and the position embedding
        return True
    norms = [torch.linalg.matrix_norm(z.double().flatten(1), ord=2).item() for z in (one, other)]
    if abs(norms[0] - 1) < SAME_START:
        return abs(norms[0] - norms[1]) < SAME_START
    roots = [z.double().square().mean().sqrt().item() for z in (one, other)]
    return abs(roots[0] / roots[1] - 1) < 6 / one.numel() ** 0.5  # 6 deviations of the quotient


def settings(checkout: Path) -> list[Row]:
    """The presets against the published configuration files."""
    yaml = importlib.import_module("yaml")
    rows = []
    for preset, name in CONFIGS.items():
        there: Any = yaml.safe_load((checkout / "configs" / f"{name}.yaml").read_text())
        here = PRESETS[preset]()
        statistics = LATENT_STATISTICS[here.data.latents or "imagenet256"]
        network, objective, optimizer, training = (there[k] for k in ("network", "loss", "optimizer", "training"))
        kwargs = network["model_kwargs"]
        pairs = {
            "scaled": (here.loss.scaled, network["do_scale_param"]),
            "detach": (here.loss.detach, network["detach_jvp"]),
            "bf16": (here.run.precision == "bfloat16", network["data_type"] == "bf16"),
            "compile": (here.run.compile, network["compile"]),
            "18 heads": (here.model.heads, int(network["model_type"].split("_")[-1].removesuffix("h"))),
            "qk norm": (here.model.qk_norm, kwargs["qk_norm"]),
            "modulation norm": (here.model.modulation_norm, kwargs["do_mod_norm"]),
            "guidance input": (here.model.guidance, kwargs["learn_guidance"]),
            "spectral time MLPs": (here.model.spectral_time_mlp, kwargs["time_specinit"]),
            "w": (here.loss.w, float(objective["cfg"])),
            "label dropout": (here.loss.label_dropout, objective["label_dropout"]),
            "times": (
                (here.times.gap_mu, here.times.gap_sigma, here.times.s_mu, here.times.s_sigma),
                tuple(objective[k] for k in ("gap_P_mean", "gap_P_std", "s_P_mean", "s_P_std")),
            ),
            "lr": (here.optim.lr, float(optimizer["lr"])),
            "betas": (list(here.optim.betas), optimizer["betas"]),
            "eps": (here.optim.eps, float(optimizer["eps"])),
            "weight decay": (here.optim.weight_decay, optimizer["weight_decay"]),
            "target EMA": (here.optim.target_ema, training["ema_target_beta"]),
            "EMA": (here.optim.ema, training["ema_beta"]),
            "batch": (here.run.batch, training["batch_size"]),
            "clip": (here.optim.clip, training.get("max_grad_norm")),
            "latents": (
                (list(statistics.mean), list(statistics.deviation)),
                (there["encoder"]["raw_mean"], there["encoder"]["raw_std"]),
            ),
        }
        wrong = [f"{what}: {ours}, published {theirs}" for what, (ours, theirs) in pairs.items() if ours != theirs]
        rows.append(
            Row(
                check="settings", subject=preset, quantity=f"{len(pairs)} values", ok=not wrong, reason="; ".join(wrong)
            )
        )
    return rows
