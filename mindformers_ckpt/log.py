"""The log of the library. Its lines hold names from outside, so that every record is made printable here."""

from __future__ import annotations

import logging

from mindformers_ckpt.printable import printable


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), None
        return True


log = logging.getLogger("mindformers_ckpt")
if not any(isinstance(own, _Printable) for own in log.filters):
    log.addFilter(_Printable())
