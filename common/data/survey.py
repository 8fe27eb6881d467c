def scripts_of(text):
    return ["Chinese"] if text else []
