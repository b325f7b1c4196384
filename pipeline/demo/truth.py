"""The constants of the simulated world, in one place."""

HISTORY_DAYS = 14  # organic clicks before the first day of the log, so that its users have a past
DAY_S = 86_400

MIN_ITEMS = 20  # fewer make no session

# With taste "pictures": ads are few and well known, and people look at offers that hardly anyone else looks at.
ADVERTISED_SHARE = 0.1  # of the items; the others are offered by sellers, and never advertised
MIN_OFFERED = 180
SELLERS = 25  # of each item that is not advertised: equal pictures, each under an item ID and an image of its own

NUM_SCENES = 4
ADS_PER_SESSION = (3, 9)
CLICK_RATE = 0.22
TEST_DAY_TRAFFIC = 2.0  # the last day is a busy one: a test set of useful size from a small simulation
LAUNCHED_DURING_LOG = 0.35  # share of the items that come in while the log runs
NEW_ITEM_SHARE = 0.09  # share of the items that come in on the last day
NEW_AD_SHARE = 0.10  # share of the last day's impressions that show them

# Standard deviation of each part of the logit, over the impressions.
LOGIT_PARTS = {
    "match": 1.5,
    "trend": 0.7,
    "mood": 0.9,
    "category": 0.6,
    "popularity": 0.4,
    "activity": 0.3,
    "scene": 0.2,
    "noise": 0.3,
}
WHERE = {
    "match": "pixels of the ad and of the behaviours together: the user's taste of that day meets the picture's look",
    "trend": "pixels of the ad: looks that everybody, or one gender, likes this season",
    "mood": "pixels of the behaviours: people who look at vivid things just now click more",
    "category": "IDs: the user's taste for categories",
    "popularity": "IDs: of the item, whatever its look",
    "activity": "IDs: of the user",
    "scene": "IDs",
    "noise": "nowhere",
}
ORACLE_MEANS = {
    "everything": "knows the true logit but for its noise",
    "without_pixels": "knows only the parts that IDs carry",
    "ids_and_memory": "knows those, and how each item that is not new does with the average user",
    "behavior_pictures": "knows those, and reads tastes and moods from the pictures of a user's last 14 days",
}
PIXEL_PARTS = ("match", "trend", "mood")
ID_PARTS = ("category", "popularity", "activity", "scene")

# Organic clicks: an item is drawn with probability softmax(sum of these times the standardised part).
BROWSE_MATCH = 2.2
BROWSE_MOOD = 1.5
BROWSE_CATEGORY = 0.7
BROWSE_POPULARITY = 0.3
ACCIDENT_SHARE = 0.2  # of the organic clicks: on anything, and short

# Sessions with ads per user and day are log-normal: many see few ads, so a user's id alone says little of the taste.
SESSIONS = 0.15  # median
SESSIONS_SIGMA = 0.7

# A taste is made of three independent parts; the shares are of its variance, what is left over passes.
SEGMENT_SHARE = 0.1  # common to the users of one age and gender
LASTING_SHARE = 0.3  # the user's own, for ever
TASTE_MEMORY = 0.93  # correlation of the passing part from one day to the next
MOOD_MEMORY = 0.8  # the same of the passing half of a mood
