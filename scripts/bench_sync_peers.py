def awex(case):
    return None
def megatron_core(case, folder):
    return None
