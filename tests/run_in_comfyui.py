"""Runs a prompt in ComfyUI's own machinery, without its server: `python run_in_comfyui.py REPOSITORY FOLDER`.

FOLDER has custom_nodes, input, output and prompt.json, which is of the form that ComfyUI's "Save (API)" writes. Printed
is a line of JSON: whether the prompt is valid, whether it ran, and the last messages to the page.
"""

import asyncio
import json
import sys
from pathlib import Path

from read_as_others import StandIns


def main(repository: str, folder: str) -> None:
    sys.path.insert(0, repository)
    sys.argv = ["main.py", "--cpu", "--base-directory", folder]
    StandIns("torchaudio")
    import comfy.options

    comfy.options.enable_args_parsing()
    import execution
    import folder_paths
    import nodes

    class Page:
        client_id, last_node_id, last_prompt_id = "page", None, "1"

        def send_sync(self, event, data, sid=None):
            messages.append((event, data))

    messages: list = []
    root = Path(repository)
    parts = [root / "comfy_extras" / name for name in ("nodes_mask.py", "nodes_preview_any.py")]
    for path in [*parts, *Path(folder_paths.get_folder_paths("custom_nodes")[0]).iterdir()]:
        assert asyncio.run(nodes.load_custom_node(str(path))), path
    prompt = json.loads((Path(folder) / "prompt.json").read_text())
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("1", prompt, None))
    executor = execution.PromptExecutor(Page())
    if valid:
        executor.execute(prompt, "1", {"client_id": "page"}, outputs)
    told = [data for event, data in messages if event in ("executed", "execution_error")]
    said = {"valid": valid, "error": error or node_errors, "success": valid and executor.success, "told": told}
    print(json.dumps(said, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
