"""Keys of `alpha_pattern` and `rank_pattern`, and the modules that PEFT takes each for.

`test_peft.py` asks the installed PEFT for the same; here are its answers, for where it is not installed.
"""

from __future__ import annotations

Q0, V0, Q1, V1, UP1 = MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
)

# key -> the modules that it names
KEYS: dict[str, tuple[str, ...]] = {
    "q_proj": (Q0, Q1),
    "self_attn.q_proj": (Q0, Q1),
    "layers.0.self_attn.q_proj": (Q0,),
    Q0: (Q0,),
    f"^{Q0}": (Q0,),
    f"^{Q0}$": (Q0,),
    "^q_proj": (),  # at the beginning of the whole name
    "^layers.0.self_attn.q_proj": (),
    r"^model\.layers\.\d+\.self_attn\.q_proj": (Q0, Q1),
    "proj": (),  # a part of a name between dots counts as a whole
    "q_pro": (),
    "_proj": (),
    ".*_proj": MODULES,
    "[qv]_proj": (Q0, V0, Q1, V1),
    "q_proj|v_proj": (Q0, V0, Q1, V1),
    "(q|up)_proj": (Q0, Q1, UP1),
    r".*\.layers\.0\..*(q_proj|v_proj)$": (Q0, V0),
    r"layers\.1\..*": (Q1, V1, UP1),
    r"model\.layers\.[1-9]\d*\.self_attn\.\w+": (Q1, V1),
    "layers.1": (),  # not the whole name
    "model": (),
    "": (),
    ".*": MODULES,
    "self_attn": (),
    f"base_model.model.{Q0}": (),  # PEFT's own prefix is not in the model
    f"model.{Q0}": (),
    "Q_PROJ": (),
    "q.proj": (Q0, Q1),
    r"(?=.*\.1\.).*q_proj": (Q1,),
    r"(?:model\.layers\.1\.)mlp\.up_proj": (UP1,),
    r"(?P<kind>q|v)_proj": (Q0, V0, Q1, V1),
    r"([qv])_proj|\3": (Q0, V0, Q1, V1),  # PEFT's own two groups come first
    "q_proj.lora_A": (),
    "q_proj ": (),
}
