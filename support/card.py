"""The model card that lies beside saved weights, as the hub reads it."""

from support import config as configs
from support.checks import hub_dataset


def model_card(keys: dict, tables: dict[str, str], described: str) -> str:
    """README.md of a trained model: a YAML head, what differs from config.yaml, and the evaluation.

    keys: the run's flat config; tables: by problem file, base against trained; described: what their numbers mean.
    """
    defaults = configs.read_defaults()
    changed = {key: value for key, value in keys.items() if value != defaults[key] and key not in ("name", "resume")}
    head = {"library_name": "transformers", "pipeline_tag": "text-generation",
            "tags": ["reinforcement-learning", keys["objective"], keys["selection.strategy"], keys["reward.kind"]]}
    if keys["model"].count("/") == 1 and not keys["model"].startswith((".", "/")):
        head["base_model"] = keys["model"]
    if named := hub_dataset(keys["data.file"]):
        head["datasets"] = [named[0]]
    return "\n".join([
        f"---\n{configs.write_yaml(head)}---\n",
        f"# {keys['model']} after {keys['steps']} steps of GRPO\n",
        "Made by a trainer of the method of \"A Few Bad Apples Spoil the Bunch\". Settings other than its defaults:\n",
        "```yaml\n" + configs.write_yaml(configs.nest(changed)) + "```\n",
        f"## Evaluation\n\n{described}.\n",
        *(f"{file}:\n\n```\n{table}\n```\n" for file, table in tables.items())])
