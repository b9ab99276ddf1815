"""Topics and marks of prompts, without a network: TF-IDF, scikit-learn's clusterings, regular expressions."""

import re

import numpy as np
from scipy.sparse import csr_array, hstack
from sklearn.cluster import HDBSCAN, MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize


def tfidf(texts):
    """Returns [n, d], sparse, rows of length 1: words and pairs of words, beside groups of 3 to 5 characters."""
    common = dict(sublinear_tf=True, stop_words="english", min_df=2 if len(texts) >= 50 else 1, max_features=100_000)
    parts = []
    for kind in (dict(ngram_range=(1, 2)), dict(analyzer="char_wb", ngram_range=(3, 5), stop_words=None)):
        try:
            parts.append(TfidfVectorizer(**common | kind).fit_transform(texts))
        except ValueError:  # not one term: only stop words, or empty texts
            continue
    return normalize(hstack(parts, format="csr")) if parts else csr_array((len(texts), 1))


def cluster(texts, embed=None, min_size=8, seed=0):
    """Returns the topic of each text: [n] int; below 0: none, where no min_size texts are near each other.

    embed(texts) -> [n, d]: an embedding, by default TF-IDF in 256 dimensions. HDBSCAN, its outliers then given to the
    nearest centroid by cosine; above 5,000 texts MiniBatchKMeans, some 50 to a topic as in the paper.
    """
    texts = list(texts)
    if min_size < 2:
        raise ValueError(f"min_size={min_size}: a cluster has two texts or more")
    if len(texts) < min_size:
        return np.full(len(texts), -1)
    if embed is None:
        points = tfidf(texts)
        rank = min(256, *(size - 1 for size in points.shape))
        with np.errstate(invalid="ignore"):  # texts that are all the same have no variance to explain
            points = TruncatedSVD(rank, random_state=seed).fit_transform(points) if rank > 1 else points.toarray()
    else:
        points = embed(texts)
        points = np.asarray(points.toarray() if hasattr(points, "toarray") else points, dtype=float)
        if points.ndim != 2 or len(points) != len(texts):
            raise ValueError(f"embed must return a row for each of {len(texts)} texts, not {points.shape}")
    points = normalize(points)
    if len(texts) > 5_000:
        return MiniBatchKMeans(len(texts) // 50, random_state=seed, n_init=1).fit_predict(points)
    topics = HDBSCAN(min_cluster_size=min_size, min_samples=1, copy=True).fit_predict(points)
    if topics.max() >= 0:
        centroids = normalize([points[topics == k].mean(0) for k in range(topics.max() + 1)])
        lost = (topics < 0) & points.any(1)  # a text without a word is near nothing
        topics[lost] = (points[lost] @ centroids.T).argmax(1) if lost.any() else 0
    return topics


def topic_names(texts, clusters, words=4):
    """Returns {cluster: its `words` most telling words}, by TF-IDF of each cluster's texts as one document."""
    names = sorted(set(np.asarray(clusters).tolist()))
    documents = [" ".join(text for text, k in zip(texts, clusters) if k == name) for name in names]
    vectorizer = TfidfVectorizer(stop_words="english", sublinear_tf=True)
    try:
        weights = vectorizer.fit_transform(documents)
    except ValueError:  # not one word
        return dict.fromkeys(names, "")
    terms = vectorizer.get_feature_names_out()
    best = [np.argsort(-row.toarray()[0], kind="stable")[:words] for row in weights]
    return {name: ", ".join(terms[top]) for name, top in zip(names, best)}


ANNOTATION = """Your task is to evaluate how well the following input prompts can assess the capabilities of advanced \
AI assistants.

For the input prompt, please analyze it based on the following 7 criteria.
1. Specificity: does it ask for a specific output, such as code, a mathematical solution or a configuration?
2. Domain Knowledge: does it cover one or more specific domains, such as programming, mathematics or hardware?
3. Complexity: does it need several steps or components, not a straightforward answer?
4. Problem-Solving Skills: must the assistant solve a problem actively, not repeat a known fact?
5. Creativity: does it need a creative approach to the problem?
6. Technical Accuracy: does it require technical accuracy in the response?
7. Real-world Application: does it relate to real-world applications, such as a functional system or practical code?

You must list the criteria numbers that the prompt satisfies in the format of a Python array. For example, "[...]". \
Do not explain your choice."""  # shortened from the paper's
HINTS = (  # one for each of BenchBuilder's criteria, see arena_hard.py
    r"\b(write|implement|code|function|table|json|regex|query|script|prove|calculate|list of \d+)\b",
    r"\b(python|java\w*|c\+\+|sql|linux|docker|aws|api|theorem|matrix|integral|kernel|protein|contract|tensor|gpu)\b",
    r"(\b(then|first|step|each|both|multiple|several|while|also)\b.*){2}|^(\S+\s+){60}",
    r"\b(how (do|can|to|would)|solve|optimi[sz]e|fix|debug|error|design|find|why|improve|plan)\b",
    r"\b(design|invent|create|story|poem|idea|brainstorm|game|imagine|propose|compose|suggest)\b",
    r"[=<>{}]|\d+\.?\d*\s?(%|ms|kb|mb|gb|hz|v|kg|m)\b|\b(exact\w*|precise\w*|correct\w*|complexity|version|algorithm)\b",
    r"\b(my|our|we|user|customer|company|production|server|app|website|business|project|data|deploy)\b",
)


def heuristic(prompt):
    """Returns a reply like an annotator's, by one regular expression for each criterion: a stand-in for tests."""
    hits = [str(k) for k, hint in enumerate(HINTS, 1) if re.search(hint, prompt, re.I | re.S)]
    return f"[{', '.join(hits)}]"


def parse_criteria(text):
    """Returns the 7 flags of an annotator's reply such as "[1, 3, 6]": a comma, then one white-space character.

    All False without such a list, or with two different ones. Source: arena-hard-auto, `BenchBuilder/category.py`.
    """
    found = set(re.findall(r"\[[1-7](?:,\s[1-7])*\]", text or ""))
    numbers = re.findall("[1-7]", found.pop()) if len(found) == 1 else ()
    return [str(k) in numbers for k in range(1, 8)]
