"""CRC-64/NVME of tensors: of bytes, and of whole tensors out of the shares of their boxes."""
