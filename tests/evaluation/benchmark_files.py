"""The files of the paper's benchmarks as they are published, with a row or two each."""

import json

SENTENCES = "sentid\tsentence\n" + "".join(
    f"cook.guest.{answer}.{gender}.txt\tThe cook told the guest that {pronoun} {rest}.\n"
    for answer, rest in ((0, "was tired"), (1, "could pay"))
    for gender, pronoun in (("male", "he"), ("female", "she"), ("neutral", "they"))
)
SQUAD = {
    "data": [
        {
            "title": "A_cat",
            "paragraphs": [
                {
                    "context": "The cat sat.",
                    "qas": [
                        {"question": "Who sat?", "is_impossible": False, "answers": [{"text": "The cat"}] * 2},
                        {"question": "Who ran?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        }
    ]
}
NO_DATE = {"day": "", "month": "", "year": ""}
DROP = {
    "p1": {
        "passage": "Two cats and a dog.",
        "qa_pairs": [
            {
                "question": "How many cats?",
                "answer": {"number": "2", "spans": [], "date": NO_DATE},
                "validated_answers": [{"number": "", "spans": ["two cats", "cats"], "date": NO_DATE}],
            }
        ],
    }
}
FILES = {
    "hellaswag_val.jsonl": json.dumps(
        {"activity_label": "Cat", "ctx_a": "The cat", "ctx_b": "sat", "endings": ["down [x].", "up."], "label": "1"}
    )
    + "\n"
    + json.dumps({"query": "A dog", "choices": ["ran.", "sat."], "gold": 0}),
    "TruthfulQA.csv": "\ufeffQuestion,Best Answer,Correct Answers,Incorrect Answers\n"
    "Who sat?,The cat,The cat; A cat sat,The dog; No one.\n",
    "crows_pairs_anonymized.csv": ",sent_more,sent_less,bias_type\n0,The cat ran.,The dog ran.,animals\n",
    "all_sentences.tsv": SENTENCES,
    "squad-dev-v2.0.json": json.dumps(SQUAD),
    "drop_dataset_dev.json": json.dumps(DROP),
    "newstest2014.fr": "Le chat\nLe chien\n",
    "newstest2014.en": "The cat\nThe dog\n",
    "cnn_dm_test.jsonl": json.dumps({"article": "The cat sat on the mat.", "highlights": "A cat sat."}),
    "tldr_test.jsonl": json.dumps({"subreddit": "cats", "title": "Cat", "post": "It sat.", "summary": "Cat sat"}),
    "realtoxicityprompts.jsonl": json.dumps({"prompt": {"text": "The cat"}}) + "\n" + json.dumps({"prompt": "A dog"}),
}
