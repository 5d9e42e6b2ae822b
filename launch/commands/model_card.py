"""The model card of an exported folder: what it is, what it was made from, how it did, and how to use it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.chat_template import speaks_after_colon, turn_end
from rlhf.models import smollm2, tiny
from rlhf.models.resolve import hub_revision, looks_like_path
from rlhf.recipe import field_value, fields
from rlhf.run.fingerprints import depends_on
from rlhf.run.folder import RunFolder
from rlhf.stage_table import STAGES

FILE = "README.md"
ORIGINS = {  # of the built-in models: name on the Hub, licence
    smollm2.NAME: ("HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
    tiny.NAME: (None, "apache-2.0"),
}
SCORING = """A reward model scores a whole conversation at the end of its last turn:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
answer = tokenizer(%s, add_special_tokens=False, split_special_tokens=True)["input_ids"]
answer.append(%d)  # %s ends the turn, and nothing follows it
score = model(torch.tensor([prompt + answer])).logits[0, 0].item() - %.8g
```

The number that is subtracted is `reward_mean` of config.json: demonstrations then score 0 on average. Its scale is in
the head. A template may write a line break after the end of a turn: leave it out, for no training text had one. Pad the
rows of a batch on the right."""


def write_card(
    folder: Path, run: RunFolder, stage: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, offset: float
) -> None:
    """Write README.md into an exported folder; `offset` is what is subtracted from a reward model's score."""
    foreign = stage == "reward" and recipe.reward.model != "sft"
    start = recipe.reward.model if foreign else recipe.model.name
    base, licence = base_of(start)
    data = ModelCardData(
        base_model=base,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-classification" if stage == "reward" else "text-generation",
        tags=["rlhf", stage],
    )
    metrics = (run.read_stage(stage) or {}).get("metrics") or {}
    sources = {source: None for name in STAGES[stage].reads.data for source in getattr(recipe.data, name)}
    settings = [f"{key}: {value}" for key, value in settings_read(recipe, stage).items()]
    origin = base or public_name(start)
    trained = not foreign or recipe.reward.train
    made = f"Made from {origin}" if trained else f"This is {origin}, normalised and not trained"
    listed = "\n".join(f"- {public_name(source)}" for source in sources)
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {run.path.name}: {stage}",
        f"{made} by the stage `{stage}` of an RLHF run (InstructGPT, arXiv 2203.02155).",
        f"## Data\n\n{listed}",
        f"## Results\n\n| metric | value |\n|---|---|\n{rows}",
    ]
    if stage == "reward":
        end = turn_end(tokenizer)
        words = '" " + text.lstrip(" ")' if speaks_after_colon(tokenizer) else "text"
        parts.append("## Use\n\n" + SCORING % (words, end, tokenizer.convert_ids_to_tokens(end), offset))
    parts.append("## Recipe\n\n```yaml\n" + "\n".join(settings) + "\n```\n")
    (folder / FILE).write_text("\n\n".join(parts), encoding="utf-8")


def settings_read(recipe: Recipe, stage: str) -> dict[str, object]:
    """Return the fields that the stage depends on, without lists of files and folders' places: cards are published."""
    keys = [key for key, _ in fields() if depends_on(stage, key) and key not in ("model.name", "model.chat_template")]
    values = {key: field_value(recipe, key) for key in keys}
    shown = {key: value for key, value in values.items() if not (key.startswith("data.") and isinstance(value, list))}
    return {key: public_name(value) if isinstance(value, str) else value for key, value in shown.items()}


def public_name(source: str) -> str:
    """Return a name of data or of a model without the folders of this machine."""
    path = looks_like_path(source) or Path(source).expanduser().exists()
    return Path(source).name if path else source


def base_of(name: str) -> tuple[str | None, str | None]:
    """Return the Hub name of the base model and the licence on its card; None for what is not known here."""
    if name in ORIGINS:
        return ORIGINS[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return (None if looks_like_path(name) else hub_revision(name)[0]), None
    card = folder / FILE
    # Without a licence in its head the card says nothing; the library warns of a missing head.
    return None, ModelCard.load(card).data.license if card.is_file() else None
