"""The model card beside a checkpoint's weights: README.md as the Hugging Face Hub shows it."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from adapters import find_file, is_hub_id
from config import Config
from families import FAMILIES
from harness.gallery import TEMPLATES


def find_license(model: str) -> dict[str, str]:
    """Return license, license_name and license_link as far as the base model's own card states them."""
    try:
        text = find_file("--model", model, "README.md").read_text(encoding="utf-8")
        data = ModelCard(text, ignore_metadata_errors=True).data
        found = {name: getattr(data, name) for name in ("license", "license_name", "license_link")}
        if (link := found["license_link"]) and "://" not in link and is_hub_id(model):
            found["license_link"] = f"https://huggingface.co/{model}/blob/main/{link}"
    except Exception:            # no card, or one that cannot be read: it is not ours, and no run ends by it
        return {}
    return {name: value for name, value in found.items() if value}


def without_paths(command: str) -> str:
    """Return a torchrun command as others type it, without this machine's paths of Python and torchrun."""
    return re.sub(r"^\S*python\S* \S*/(?=torchrun )", "", command)


def write_card(folder: Path, place: Path, config: Config, pipeline: str, *, command: str,
               license: dict[str, str], history: list[dict], epoch: int) -> None:
    """Write README.md into `folder`, an adapter's or a transformer's, which will be moved to `place`.

    history: metrics of epochs. The card tells the first evaluation and the last one up to `epoch`.
    A local directory is no base_model, because the hub would refuse the card.
    """
    base = {"base_model": config.model} if is_hub_id(config.model) else {}
    missing = [f"`{name}`" for name in ("base_model", "license") if name not in {**base, **license}]
    tags = ["lora"] * (folder.name == "adapter") + ["flow-grpo", "text-to-image"]
    data = ModelCardData(**base, **license, library_name="diffusers", pipeline_tag="text-to-image", tags=tags)
    evaluated = [m for m in history if "eval/total" in m and m["epoch"] <= epoch]
    shown = evaluated[:1] + evaluated[1:][-1:]
    argument, none = FAMILIES[pipeline].guidance_argument
    weights = dict.fromkeys(config.eval_rewards, 0.0) | dict(config.rewards)
    rows = [(name, f"{weight:g}", f"eval/{name}") for name, weight in weights.items()]
    rows += [("total", "", "eval/total"), ("spread of mean colours, of 255", "", "spread/eval")]
    card = TEMPLATES.get_template("card.md").render(
        card_data=data.to_yaml(), missing=missing, config=config, epoch=epoch, shown=shown, rows=rows,
        command=without_paths(re.sub(r"//[^/\s]*@", "//", command)),     # without the passwords of URLs
        # A family of one's own has the class itself, and diffusers' have its name there.
        module=getattr(FAMILIES[pipeline].pipeline, "__module__", "diffusers"),
        pipeline=pipeline, place=place, is_adapter=folder.name == "adapter",
        guidance=f"{argument}={config.guidance_scale - 1 + none:g}")
    # A path in the command may hold bytes that are no text.
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
