"""Texts on which three tokenizers must agree."""

TEXTS = (
    "",
    " ",
    "What is the capital of France?",
    "  leading and   inner spaces  ",
    "tabs\tand\nnew lines\n\n\nend\r\n",
    "1234567890 3.14159 2026-11-23",
    "def f(x):\n    return {x: [1, 2]}  # ok\n",
    "naïve café — “quotes”…",
    "你好,世界!今天天气怎么样?",
    "🙂👩‍👩‍👧 emoji",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "don't I'll we've SHOUT'S",
    "e\u0301 decomposed, \u00a0nbsp\u2003em",
    "العربية עברית हिन्दी ไทย 한국어 日本語",
    "a" * 300,
)
