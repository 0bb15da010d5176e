class Publisher:
    def __init__(self, *args):
        pass

    def wait(self):
        pass
