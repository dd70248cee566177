"""What CheckpointReader finds in a checkpoint, written to a file by the first rank.

    python -m megamem.run --cpu tests/helpers/reads_checkpoint.py FOLDER TOKENS OUTPUT SETTINGS

TOKENS is what logits.py has written, and SETTINGS are Megatron's flags as JSON.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from checkpoint_reader import CheckpointReader, Prompt


def main() -> None:
    folder, saved, output, settings = sys.argv[1:]
    reader = CheckpointReader(folder, json.loads(settings), batch_size=2)
    written = torch.load(saved)["written"].tolist()
    length = torch.load(saved)["tokens"].shape[1]
    # texts of one batch differ in length, which may not be one that ranks can divide
    scores = reader.score([text[: len(text) - 5 * place] for place, text in enumerate(written)])
    longest = len(written[0]) - length
    prompts = [Prompt(text[:length], longest) for text in written]
    # the last ends early
    third = reader.tokenizer.detokenize(written[-1][length + 2 : length + 3])
    prompts[-1] = Prompt(prompts[-1].tokens, longest, stop=("no number", third))
    found = {"scores": scores, "texts": reader.continue_texts(prompts)}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
