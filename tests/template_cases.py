"""Chat templates that finish a turn otherwise than they prompt for one, after those of published models."""

_HEAD = "{% for m in messages %}"
_TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
_OTHERS = f"{_HEAD}{{% if m['role'] != 'assistant' %}}{_TURN}{{% else %}}"
_SPLIT = (
    "{% set said = m['content'].split('</think>')[-1].lstrip('\n') %}{% set thought = '' %}"
    "{% if '</think>' in m['content'] %}"
    "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
)
_END = "<|im_end|>\n{% endif %}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_OPEN_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
_BLOCK = "<|im_start|>assistant\n<think>\n{{ thought }}\n</think>\n\n{{ said }}"

ADDS_BLOCK = f"{_OTHERS}{_SPLIT}{_BLOCK}{_END}{_PROMPT}"
"""Qwen3's: a thinking block, empty or not, in every turn that is said, and none in the prompt."""
OPENS_BLOCK = f"{_OTHERS}{_SPLIT}{_BLOCK}{_END}{_OPEN_PROMPT}"
"""Qwen3.5's: the prompt opens the block."""
OPENS_AND_FORGETS = f"{_OTHERS}{_SPLIT}<|im_start|>assistant\n{{{{ said }}}}{_END}{_OPEN_PROMPT}"
"""DeepSeek-R1's: the prompt opens the block, and finished turns have none."""
REPEATS_BLOCK = f"{_OTHERS}<|im_start|>assistant\n<think>\n\n</think>\n\n{{{{ m['content'] }}}}{_END}{_OPEN_PROMPT}"
"""Qwen3.8's: an empty block before every content, also before one that has a block."""
SHOUTS = f"{_OTHERS}<|im_start|>assistant\n{{{{ m['content'] | upper }}}}{_END}{_PROMPT}"
"""One that writes a response in other words."""
SILENT = f"{_OTHERS}<|im_start|>assistant\n{_END}{_PROMPT}"
"""One that leaves out what the assistant says, as templates for pictures do with plain text."""
REWRITES_THE_PROMPT = (
    "{% set done = messages[-1]['role'] == 'assistant' %}"
    f"{_HEAD}<|im_start|>{{{{ m['role'] }}}}{{{{ ' done' if done else '' }}}}\n{{{{ m['content'] }}}}<|im_end|>\n"
    f"{{% endfor %}}{_PROMPT}"
)
"""One that writes the question otherwise once it is answered."""
TAKES_APART = (
    f"{_HEAD}<|im_start|>{{{{ m['role'] }}}}\n{{{{ m['content'].split('|im_end|')[0] }}}}<|im_end|>\n"
    f"{{% endfor %}}{_PROMPT}"
)
"""One that cuts a spelling of a control token in two."""
