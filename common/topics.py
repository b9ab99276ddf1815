"""Topics of texts, without a network: TF-IDF as the embedding, scikit-learn's clusterings, names from telling words."""

import numpy as np
from scipy.sparse import csr_array, hstack
from sklearn.cluster import HDBSCAN, MiniBatchKMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize


def tfidf(texts):
    """Returns [n, d], sparse, rows of length 1: words and pairs of words, beside groups of 3 to 5 characters."""
    common = dict(sublinear_tf=True, stop_words="english", min_df=2 if len(texts) >= 50 else 1)
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
    nearest centroid by cosine; above 10,000 texts MiniBatchKMeans, 50 texts to a topic as in the paper.
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
        points = np.asarray(embed(texts), dtype=float)
        if points.ndim != 2 or len(points) != len(texts):
            raise ValueError(f"embed must return a row for each of {len(texts)} texts, not {points.shape}")
    points = normalize(points)
    if len(texts) > 10_000:
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
