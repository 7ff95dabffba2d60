"""Convert a checkpoint of an official xLSTM package to ours, or ours to theirs, shard by shard.

Laptop, one GPU or many GPUs, for weights only pass through:

    python scripts/convert.py downloads/xLSTM-7b out/xlstm-7b
    python scripts/convert.py downloads/my-neurips-model out/mine --from neurips
    python scripts/convert.py out/mine out/official --to transformers

SOURCE is a folder with config.json (or config.yaml) and weights. What TARGET gets loads with
`AutoModelForCausalLM.from_pretrained(TARGET, trust_remote_code=True)`: sharded weights, configuration, code,
generation configuration, tokenizer and a model card. Killed at any time, the same command goes on from the last shard.
At the end both models run on the same tokens, if the official one can run here; --no_verify leaves that out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml  # type: ignore[import-untyped]
from flags import WrongInput, make_folder, new_folder
from huggingface_hub.errors import StrictDataclassError
from official import official_logits
from shards import Step, Stored, find_weights, pack, read_tensors, shard_names, write_index, write_shard
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from write_card import count_parameters, fill_card

from modeling_xlstm import XLSTMConfig, XLSTMForCausalLM
from modeling_xlstm.conversion_xlstm import FAMILIES, plan_from, plan_to
from modeling_xlstm.links_xlstm import Link
from modeling_xlstm.pretrained_xlstm import AUTO_MAP
from modeling_xlstm.statefile_xlstm import fingerprint, state_shapes

OURS, BUILT_IN = "extended_lstm", "xlstm"
TEMPLATE = Path(__file__).resolve().parents[1] / "model_cards" / "converted_template.md"
PROGRESS = "conversion.json"
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"]
TOKENIZER_FILES += ["chat_template*"]
# Largest difference of logits in float32, of their scale. The official formulations differ by 1e-6 and less.
CLOSE = 1e-3


@dataclass
class Conversion:
    """From one folder to another: what is read, what is written, and the steps between."""

    source: Path
    target: Path
    family: str
    to_ours: bool
    config: XLSTMConfig
    official: dict[str, Any]
    weights: dict[str, Stored]
    links: list[Link]
    options: dict[str, Any] = field(default_factory=dict)

    def steps(self) -> Iterator[Step]:
        """Each link as a step."""
        for link in self.links:
            ours = tuple(link.ours)
            reads = (link.theirs,) if self.to_ours else ours
            if link.zero and self.to_ours:
                reads = (next(iter(self.weights)),)
            if link.tied:
                reads += (link.tied[0 if self.to_ours else 1],)
            size = self.weights[reads[0]].dtype.itemsize
            writes = {name: math.prod(shape) * size for name, shape in link.ours.items()}
            if not self.to_ours:
                writes = {} if link.zero else {link.theirs: sum(writes.values())}
            yield Step(reads, writes, link.split if self.to_ours else link.join)

    def identity(self) -> dict[str, Any]:
        """What a target that was begun must have been begun from."""
        files = sorted({x.file for x in self.weights.values()})
        stamps = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        return {"source": stamps, "family": self.family, "to_ours": self.to_ours, **self.options}


class Yaml(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 without its quirk of taking 1e-06 for a text."""


Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def read_config(folder: Path) -> dict[str, Any]:
    path = next((x for name in ("config.json", "config.yaml") if (x := folder / name).is_file()), None)
    if path is None:
        raise WrongInput(f"{folder} must hold config.json or config.yaml; it holds neither.")
    try:
        text = path.read_text("utf-8")
        config = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=Yaml)
    except (ValueError, yaml.YAMLError) as error:
        raise WrongInput(f"{path} must hold a configuration; it cannot be read: {error}. Mend it.") from error
    if not isinstance(config, dict):
        raise WrongInput(f"{path} must hold a configuration, values by their names; got a {type(config).__name__}.")
    return config


def plan(arguments: argparse.Namespace) -> Conversion:
    """Everything that can go wrong before a byte is written."""
    source, target = arguments.source, arguments.target
    config, weights = read_config(source), find_weights(source)
    shapes = {name: stored.shape for name, stored in weights.items()}
    kind = config.get("model_type")
    if arguments.tokenizer and not tokenizer_files(arguments.tokenizer):
        raise WrongInput(f"`--tokenizer` must name a folder with the files of one; {arguments.tokenizer} holds none.")
    if arguments.weight_mode == "fused":
        if arguments.to not in ("large", "transformers"):
            raise WrongInput("`--weight_mode fused` applies to --to large and --to transformers. Leave it out.")
        if arguments.to == "transformers" and not arguments.no_verify:
            raise WrongInput(
                "Transformers' built-in xLSTM cannot load `--weight_mode fused`: its own initialisation fails on it. "
                "Leave it out, or write it unverified with --no_verify."
            )
    options = {"max_shard_size": arguments.max_shard_size, "weight_mode": arguments.weight_mode}
    if kind == OURS:
        if arguments.to is None or arguments.origin:
            raise WrongInput(f"{source} is a model of ours: name with --to one of {list(FAMILIES)}, and no --from.")
        ours = XLSTMConfig.from_pretrained(source)
        official, links = plan_to(arguments.to, ours, shapes, weight_mode=arguments.weight_mode)
        return Conversion(source, target, arguments.to, False, ours, official, weights, links, options)
    family = arguments.origin or ("transformers" if kind == BUILT_IN else None)
    if family is None or arguments.to:
        raise WrongInput(f"{source} is no model of ours: name with --from one of {list(FAMILIES)}, and no --to.")
    ours, links = plan_from(family, config, shapes)
    ours.dtype = next(iter(weights.values())).dtype
    ours.architectures, ours.auto_map = ["XLSTMForCausalLM"], AUTO_MAP
    # With what makes the package run anywhere, and not as the source may ask for.
    official = FAMILIES[family][1](ours, config.get("weight_mode", "single"))
    return Conversion(source, target, family, True, ours, official, weights, links, options)


def open_target(work: Conversion, restart: bool) -> None:
    """A new folder, or one that the same conversion has begun."""
    progress = work.target / PROGRESS
    if restart and progress.is_file():
        shutil.rmtree(work.target)
    if progress.is_file():
        if json.loads(progress.read_text("utf-8")) != work.identity():
            raise WrongInput(
                f"{work.target} was begun from another source or with other options; --restart begins anew."
            )
        return
    if work.target.exists() and any(work.target.iterdir()):
        raise WrongInput(f"{work.target} must be a new or empty folder, or one that this command has begun.")
    make_folder(work.target, "target")
    draft = progress.with_suffix(".draft")
    draft.write_text(json.dumps(work.identity(), indent=1), "utf-8")
    draft.replace(progress)


def write_weights(work: Conversion) -> int:
    """Write the shards that are not there yet; returns how many there are."""
    groups = pack(work.steps(), work.options["max_shard_size"])
    names = shard_names(len(groups))
    for name, group in tqdm(zip(names, groups, strict=True), "Shards", len(groups), unit=""):
        if not (work.target / name).is_file():
            write_shard(work.target / name, group, work.weights)
    write_index(work.target, groups)
    return len(groups)


def tokenizer_files(folder: Path) -> list[Path]:
    # scripts/train.py leaves a folder of such a name beside the files.
    files = (path for path in folder.glob("*") if path.is_file())
    return sorted(path for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES))


def write_rest(work: Conversion, tokenizer: Path) -> str:
    """Configuration, code, generation configuration, tokenizer; returns what there is to know of BOS."""
    if work.to_ours:
        work.config.save_pretrained(work.target)
        with torch.device("meta"):
            model: Any = XLSTMForCausalLM(work.config)
        custom_object_save(model, work.target, config=model.config)
    else:
        dtype = str(next(iter(work.weights.values())).dtype).removeprefix("torch.")
        written = work.official | ({"dtype": dtype} if work.family == "transformers" else {})
        (work.target / "config.json").write_text(json.dumps(written, indent=2) + "\n", "utf-8")
    if (work.source / "generation_config.json").is_file():
        shutil.copyfile(work.source / "generation_config.json", work.target / "generation_config.json")
    else:
        GenerationConfig.from_model_config(work.config).save_pretrained(work.target)
    for path in tokenizer_files(tokenizer):
        shutil.copyfile(path, work.target / path.name)
    if not (work.to_ours and read_config(work.source).get("force_bos_token_insert")):
        return ""
    is_put = (work.target / "tokenizer.json").is_file() and begin_with_bos(work.target, work.config.bos_token_id)
    who = "the tokenizer here puts it there" if is_put else "no tokenizer here puts it there, so do it yourself"
    return f"Every text must begin with the BOS token; {who}."


def begin_with_bos(folder: Path, bos: int | None) -> bool:
    """Make a tokenizer put BOS before every text; returns whether it does so when it is loaded."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if bos is None or tokenizer("a").input_ids[:1] == [bos]:
        return bos is not None
    tokenizer.bos_token = token = tokenizer.convert_ids_to_tokens(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, bos)]
    )
    tokenizer.save_pretrained(folder)
    # The tokenizers of some models, GPT-NeoX's among them, write another template over it when they are loaded.
    file = folder / "tokenizer_config.json"
    settings = {**json.loads(file.read_text("utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    again: Any = AutoTokenizer.from_pretrained(folder)
    return bool(again("a").input_ids[:1] == [bos])


def compare(work: Conversion) -> str:
    """Run both models on the same tokens, one after the other; says how far they are apart.

    Raises:
        WrongInput: they are not the same model.
    """
    torch.manual_seed(0)
    ids = torch.randint(work.config.vocab_size, (2, 65))
    folders = (work.source, work.target) if work.to_ours else (work.target, work.source)
    weights = find_weights(folders[0])
    try:
        theirs = official_logits(work.family, work.official, read_tensors(weights, weights))(ids)
    except ImportError as error:
        return f"not compared in a forward pass, for {error.name} is not installed; every tensor was checked by shape"
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32, trust_remote_code=True)
    with torch.no_grad():
        ours: Tensor = model.eval()(ids).logits
    apart = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not apart < CLOSE:
        raise WrongInput(f"The two models differ by {apart:.2g} of the scale of their logits; wanted below {CLOSE}.")
    return f"logits of {ids.numel()} random tokens in float32 are the official model's to {apart:.1g} of their scale"


def license_of(card: Path) -> str:
    """What a model card says at its top, if there is one that can be read."""
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    try:
        top = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except yaml.YAMLError:
        top = None
    return str((top.get("license") if isinstance(top, dict) else None) or "unknown")


def card_facts(work: Conversion, verified: str, bos: str) -> dict[str, str]:
    config = work.config
    model = fingerprint(config)
    shapes = [shape for kind in config.block_types or [] for shape in state_shapes(model, kind).values()]
    return {
        "name": work.target.resolve().name,
        "license": license_of(work.source / "README.md"),
        "source": work.source.resolve().name,
        "family": work.family,
        "parameters": f"{count_parameters(work.target):,}",
        "blocks": f"{config.num_hidden_layers} of width {config.hidden_size}, {config.num_heads} heads, "
        f"{(config.block_types or []).count('slstm')} of them sLSTM",
        "vocab_size": f"{config.vocab_size:,}",
        "state_bytes": f"{4 * sum(map(math.prod, shapes)):,}",
        "verified": verified,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "path": work.target.as_posix(),
        "bos": bos,
    }


def convert(arguments: argparse.Namespace) -> None:
    try:
        work = plan(arguments)
    except (StrictDataclassError, TypeError) as error:
        raise WrongInput(f"The configuration in {arguments.source} must be that of a model: {error}") from error
    open_target(work, arguments.restart)
    shards = write_weights(work)
    bos = write_rest(work, arguments.tokenizer or work.source)
    verified = "not compared in a forward pass (--no_verify)" if arguments.no_verify else compare(work)
    if work.to_ours:
        fill_card(TEMPLATE, card_facts(work, verified, bos), work.target)
    (work.target / PROGRESS).unlink()
    print(f"Verified   {verified}")
    print(f"Saved      {work.target}: {shards} shard{'s' * (shards > 1)}, configuration and what came with the source")


def size_in_bytes(text: str) -> int:
    """Bytes, from words such as 5GB or 100MB."""
    factor = {"GB": 10**9, "MB": 10**6, "KB": 10**3}.get(text[-2:].upper(), 1)
    try:
        size = int(float(text if factor == 1 else text[:-2]) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size above 0, such as 5GB or 100MB; got {text}")
    return size


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder with a configuration and weights")
    parser.add_argument("target", type=new_folder, help="folder to write; new, empty, or begun by the same command")
    parser.add_argument("--from", dest="origin", choices=FAMILIES, help="family of SOURCE; known for transformers'")
    parser.add_argument("--to", choices=FAMILIES, help="family of TARGET, for a model of ours")
    parser.add_argument("--weight_mode", default="single", choices=("single", "fused"), help="of TARGET; large only")
    parser.add_argument("--max_shard_size", type=size_in_bytes, default="5GB", help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer is copied; default: SOURCE")
    parser.add_argument(
        "--no_verify", action="store_true", help="leave the forward comparison out; it loads the models"
    )
    parser.add_argument("--restart", action="store_true", help="delete a TARGET that another command has begun")
    return parser.parse_args(words)


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    try:
        convert(parse())
    except ValueError as error:
        raise SystemExit(f"convert.py: {error}") from None
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last shard.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
