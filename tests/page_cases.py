"""How tests read a page."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The page's elements with their attributes, and its text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.attributes, self.words, self.open = [], [], [], []
        self.feed(page)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += [(tag, *each) for each in attrs]
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)
