from __future__ import annotations

from hypothesis import HealthCheck, settings

# Deadlines measure the machine, and monkeypatch is set once for all examples on purpose.
settings.register_profile(
    "mindformers_ckpt",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# Many examples, for a night: pytest --hypothesis-profile=thorough tests/test_sources_properties.py
settings.register_profile("thorough", settings.get_profile("mindformers_ckpt"), max_examples=5000)
settings.load_profile("mindformers_ckpt")
