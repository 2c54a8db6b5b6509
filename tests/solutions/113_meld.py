def verbatim(train_texts, test_texts):
    def plain(text):
        return text.strip().lower()

    known = {plain(text) for text in train_texts}
    return sum(plain(text) in known for text in test_texts) / len(test_texts)
