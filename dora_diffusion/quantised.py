"""PLACEHOLDER by the lead until helper-6 writes this file: overwrite it."""


def dequantise(module):
    return None


def is_quantised(module):
    return False


def refuse_unknown(path, module):
    return None
