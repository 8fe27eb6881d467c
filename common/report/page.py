import json


def page(record):
    return "<pre>" + json.dumps(record).replace("<", "&lt;")
