# ruff: noqa: RUF001
"""A few sentences in each of twenty languages and many scripts, and harder text."""

TEXTS = {
    "English": "He smiled. It was a fine day… She agreed! “Was it late?” They didn't know. No.\n",
    "German": "Es war schön. Die Straße führte über die Brücke. Wohin? Niemand wußte es!  Gut.",
    "French": "L’été fut court. « Où es-tu ? » demanda-t-elle. Ça va ! Elle avait 20 ans.",
    "Spanish": "¿Dónde está el niño? Mañana vendrá. ¡Qué alegría! Costó 1.250,50 €.",
    "Polish": "Zażółć gęślą jaźń. Był to piękny dzień. Dokąd poszła? Nie wiem!",
    "Turkish": "İstanbul'da yağmur yağıyor. Işıklar söndü. Nereye gidiyorsun? Eve.",
    "Vietnamese": "Hôm nay trời đẹp. Chúng tôi đi chợ. Bạn ở đâu? Ở nhà!",
    "Russian": "Все счастливые семьи похожи. Он улыбнулся. Куда она ушла? Никто не знал!",
    "Ukrainian": "Щастя є. Її ґанок був зелений. Хто там? Це я, з'їж борщ!",
    "Greek": "Ήταν ωραία μέρα. Πού πήγε; Κανείς δεν ήξερε. Τέλος!",
    "Hebrew": "בראשית היה הדבר. לאן הלכה? שָׁלוֹם עליכם! סוף.",
    "Arabic": "كان يومًا جميلًا. أين ذهبت؟ لا أحد يعلم! انتهى.",
    "Persian": "هوا خوب بود. او کجا رفت؟ نمی‌دانم! تمام شد.",
    "Hindi": "वह मुस्कुराया। दिन अच्छा था। वह कहाँ गई? कोई नहीं जानता!",
    "Bengali": "সে হাসল। দিনটি সুন্দর ছিল। সে কোথায় গেল? কেউ জানে না!",
    "Tamil": "அவன் சிரித்தான். நாள் நன்றாக இருந்தது. அவள் எங்கே? தெரியாது!",
    "Thai": "เขายิ้ม วันนี้อากาศดี เธอไปไหน? ไม่มีใครรู้! จบ. Fin.",
    "Chinese": "他笑了。今天天气很好！她去哪儿了？没有人知道。「完了。」他说。",
    "Japanese": "吾輩は猫である。名前はまだ無い。どこで生れたか？見当がつかぬ！ｶﾞｷﾞ。",
    "Korean": "그는 웃었다. 날씨가 좋았다. 그녀는 어디로 갔을까? 아무도 몰랐다!",
}
"""By the language's name."""

HARD_TEXTS = (
    "",
    " ",
    "\n\n",
    "  Two spaces before.  Two between.   Three.  And two behind.  ",
    "def f(x):\n\tif x:\r\n\t\treturn  x + 1\n\n\n# The end. Really.\n    indented\n",
    "Shall I compare thee\n  to a summer's day?\n\n  Thou art more lovely.\n",
    "Emoji 👩‍👩‍👧‍👦 stand here. 🇫🇷🇩🇪 Flags! 👍🏽 Thumbs? ☃️ Snow.",
    "Decomposed: e\u0301le\u0300ve. A\u030angstro\u0308m! Ligatures: ﬁne ﬂow. ½ of it. ① ² ™",
    "Zero\u200bwidth and\u00a0no-break.\u2028A line separator. \ufeffA mark. \u0007Bell. \x0cPage.",
    "x" * 300 + ". " + "Yes. " * 40,
    "[MASK] and </s> and <s> are written. <|endoftext|> too. [CLS] Is it text?",
    "He said \"go.\" 'Why?' (Because.) [Done.] «Oui.» Dr. J. S. Bach e.g. wrote. I agree.",
    "1.5 kg, 2.000,00 and 3,000.00. 1999. A year?!?! What...  ... So.",
    "▁ is U+2581. Ġ is a letter. Ċ too. ▁▁",
)
"""Whitespace, line ends, code, verse, combining characters, and names of special tokens."""
