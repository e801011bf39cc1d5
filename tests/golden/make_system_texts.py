"""Write tests/golden/system_texts.json: system texts as chat templates of transformers render them.

Run it by hand with transformers: `python tests/golden/make_system_texts.py`. The templates are
those of the Hugging Face hub for the models that the built-in formats belong to, without what they
say of videos. A conversation is rendered without a system text and with one.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

OUT = Path(__file__).parent / "system_texts.json"
SYSTEM = "Answer briefly."
QUESTION = "Why?"

IMAGES = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
TEXTS = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
)
SPACED_TEXTS = TEXTS.replace("content['text'] }}", "content['text'] + ' ' }}")
CHATML_MESSAGE = "{{ '<|im_start|>' + message['role'] + '\n' }}" + IMAGES + TEXTS
CHATML_ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3_DEFAULT = (
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
    "assistant. You are able to understand the visual content that the user provides, and assist "
    "the user with a variety of tasks using natural language.<|eot_id|>' }}{% endif %}"
)
QWEN_DEFAULT = (
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)
TEMPLATES = {
    "vicuna": (
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        + IMAGES
        + SPACED_TEXTS
        + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
        + IMAGES
        + TEXTS
        + "{{ ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    # of the 34B, which leaves the system text to the user
    "chatml": (
        "{% for message in messages %}"
        + CHATML_MESSAGE
        + "{{ '<|im_end|>' }}{% endfor %}"
        + CHATML_ANSWER
    ),
    "qwen": (
        "{% for message in messages %}"
        + QWEN_DEFAULT
        + CHATML_MESSAGE
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        + CHATML_ANSWER
    ),
    "llama3": (
        "{% for message in messages %}"
        + LLAMA3_DEFAULT
        + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        + IMAGES
        + TEXTS
        + "{{ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # of Llama 2, whose system text stands in the first question
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system_message = messages[0]['content'][0]['text'] %}"
        "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
        "{% for message in loop_messages %}{{ '[INST] ' }}"
        "{% if loop.index0 == 0 and system_message != false %}"
        "{{ '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' }}{% endif %}"
        + IMAGES
        + TEXTS
        + "{{ ' [/INST]' }}{% endfor %}"
    ),
}


def render(template, system=None) -> str:
    """Return the prompt that a template writes for one question about one image."""
    question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": question}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    texts, _ = render_jinja_template(
        conversations=[messages], chat_template=template, add_generation_prompt=True
    )
    return texts[0]


def main():
    """Render all templates, and write what came out."""
    prompts = {}
    for name, template in TEMPLATES.items():
        prompts[name] = {"without": render(template), "with": render(template, SYSTEM)}
    made_with = {"python": platform.python_version(), "transformers": version("transformers")}
    content = {"made_with": made_with, "system": SYSTEM, "question": QUESTION, "prompts": prompts}
    OUT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
