"""Generator of Vietnamese phone reviews, labelled with the sentiment about each of eleven aspects.

Each review is generated in three steps. Its content depends on the buyer's mood: opinions on a few aspects, and filler
sentences. It is then written in a personal style, with short forms, typos, missing tones and emoticons. Finally it is
labelled, with some errors. Each step has its own random generator, so that the same content can also be written without
the style. No model reaches 100%: some phrases fit two sentiments or two aspects, some opinions do not name their
aspect, some praise is ironic, and some labels are wrong.
"""

import csv
import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.storage.folders import made_once
from pipeline.tasks.visobert.config import EmbeddedReviewsConfig

T = TypeVar("T")
Labels = dict[str, str]  # aspect -> sentiment

SPLITS = ("train", "validation", "test")
SENTIMENTS = ("Positive", "Negative", "Neutral")
# Content, with weights. Moods are named after their most frequent sentiment.
MOODS = {"Positive": 0.50, "Neutral": 0.18, "Negative": 0.32}
SENTIMENT_IN = {"Positive": (0.94, 0.02, 0.04), "Neutral": (0.43, 0.37, 0.20), "Negative": (0.04, 0.90, 0.06)}
ASPECTS_SAID = {0: 0.03, 1: 0.37, 2: 0.33, 3: 0.165, 4: 0.065, 5: 0.025, 6: 0.015}
ASPECT_IN = {"Battery": 13, "Camera": 12, "Performance": 13, "Display": 9, "Design": 10, "Packaging": 7, "Price": 11,
             "Shop_Service": 10, "Shipping": 10, "General": 14, "Others": 2}  # fmt: skip
ASPECTS = tuple(ASPECT_IN)
TIMES_SAID = {1: 0.70, 2: 0.19, 3: 0.07, 5: 0.04}  # number of clauses about one aspect
FILLERS_SAID = {0: 0.46, 1: 0.28, 2: 0.16, 3: 0.05, 6: 0.02, 12: 0.03}
# Style: shares of shortened and of mistyped words; separators of sentences and ends of reviews; conjunctions.
SHORTENED, MISTYPED = {0.0: 0.6, 0.2: 0.27, 0.6: 0.13}, {0.0: 0.7, 0.03: 0.25, 0.08: 0.05}
BREAKS = {". ": 40, ", ": 22, " ": 10, "... ": 6, "! ": 4, "\n": 13, ".\n": 7}
ENDS = {".": 40, "": 40, "!": 6, "...": 5, "!!!": 3, " ạ": 3, " .": 3}
AND = (", ", ", ", " và ", ", lại còn ", " mà ", " + ", ", rồi ")
BUT = (" nhưng ", " nhưng ", ", tuy nhiên ", ", còn ", " mà ", ", bù lại ", ", mỗi tội ", ", có điều ", ", ")
# Annotation errors: rates of missing labels, of wrong sentiments, and of reviews with an additional aspect.
LOST, CONFUSED, SPURIOUS = 0.01, 0.02, 0.01

# Phrases: the nouns of an aspect, then positive (+), negative (-) and neutral (=) phrases. {word} is replaced with a
# choice from WORDS, {} with a noun of the aspect.
_PHRASES = """
Battery: pin | pin | pin máy | thời lượng pin | cục pin | pin với sạc
Battery+: pin {rất} trâu | dùng cả ngày chưa hết pin | pin xài {2} ngày mới phải sạc | chẳng lo hết pin giữa đường
  sạc {rất} nhanh | cắm {20} phút là đầy | để qua đêm chỉ tụt 1% | chơi {game} {2} tiếng mới hết {20}% | pin bền {lắm}
  xài thả ga không cần sạc dự phòng | onscreen hơn {2} tiếng | sáng sạc tối vẫn còn {20}%
Battery-: pin tụt {rất} nhanh | pin yếu {lắm} | ngày sạc {2} lần | sạc {2} tiếng chưa đầy | pin bị phồng sau {2} tuần
  pin trâu ghê sạc {2} lần một ngày | vừa lướt {facebook} tí đã báo đỏ | pin ảo {20}% là sập nguồn | sạc không vào
  đi đâu cũng ôm cục sạc theo | để không cũng hao | nóng như hòn than
Battery=: pin vừa đủ một ngày | pin 5000mah | chưa test pin kỹ | sạc mất hơn 1 tiếng | ngày sạc 1 lần
Camera: camera | cam | ảnh chụp | chụp hình | camera trước | quay video
Camera+: chụp ảnh {rất} nét | cam xịn {lắm} | selfie {rất} ảo | ảnh trong trẻo màu tự nhiên | chống rung {tốt}
  chụp đêm vẫn sáng rõ | sống ảo thì hết ý | zoom {2}x vẫn rõ | lấy nét nhanh | chụp xóa phông đẹp | quay 4k mịn
  up ảnh lên mạng ai cũng khen
Camera-: chụp ảnh mờ {lắm} | cam vỡ nét | chụp đêm tối như mực | ảnh bị nhòe hết | 64mp mà thua máy cũ 13mp
  ảnh ám vàng như bị bệnh | zoom lên toàn hạt | xịn tới mức không nhận ra mặt mình | lấy nét mãi không xong
  mở cam lên là đen thui | màu ảnh nhợt nhạt | quay rung lắc {lắm}
Camera=: camera {20}mp | chụp đủ dùng | chưa chụp nhiều nên chưa biết | có 3 camera sau | ảnh chụp cũng được
Performance: hiệu năng | cấu hình | con chip | tốc độ máy | chơi game | độ mượt
Performance+: máy chạy {rất} mượt | mượt {lắm} | chơi {game} không giật | mở app nhanh | đa nhiệm {tốt} | chip mạnh
  lướt {facebook} êm ru | chưa thấy lag lần nào | nhanh gọn lẹ | cày {game} {20} fps ổn định | vuốt chạm tức thì
  ram {2}gb mở chục app không load lại
Performance-: máy lag {lắm} | giật lag liên tục | chơi {game} là đơ | chậm như rùa | hay bị văng app | treo máy hoài
  mở {facebook} cũng phải chờ | tự khởi động lại {2} lần một ngày | mượt dữ vuốt cái đứng hình {2} giây | đơ toàn tập
  nóng như hòn than | ram {2}gb cho có
Performance=: máy chạy {thường} | đủ lướt {facebook} nghe gọi | chip đời trước | ram {2}gb | lâu lâu khựng tí không sao
Display: màn hình | màn | độ sáng màn hình | cảm ứng | độ nét của màn | hiển thị
Display+: màn hình {rất} nét | màn đẹp {lắm} | màu sắc tươi sống động | màn 120hz vuốt sướng tay | xem phim đã mắt
  ra nắng vẫn nhìn rõ | viền mỏng coi {facebook} {rất} đã | cảm ứng nhạy {lắm} | nhìn lâu không mỏi mắt | nét căng
  không có điểm chết nào | đẹp {lắm}
Display-: màn hình bị sọc | màn ám vàng | màn tối {lắm} | màn bị hở sáng | có điểm chết ngay giữa | cảm ứng loạn
  màn dễ trầy {lắm} | nhìn như qua sương | lưu ảnh sau {2} tuần | màn hình đẹp đấy có 2 sọc xanh | nhấp nháy liên tục
  chạm chỗ này ăn chỗ kia
Display=: màn hình 6.{2} inch | màn lcd thường | màn 60hz thôi | độ sáng vừa phải | màn đủ xem {facebook}
Design: thiết kế | ngoại hình | kiểu dáng | mẫu mã | vỏ máy | mặt lưng
Design+: máy đẹp {lắm} | cầm {rất} sang | mỏng nhẹ | màu {đen} đẹp xuất sắc | cầm vừa tay | nhìn sang chảnh | đẹp {lắm}
  thiết kế {rất} tinh tế | hoàn thiện chắc chắn | cầm lên là mê | gọn gàng bỏ túi vừa | ai thấy cũng hỏi mua ở đâu
Design-: máy dày và nặng | vỏ nhựa nhìn rẻ tiền | trầy xước sẵn | màu {đen} giao khác hình | nút nguồn lỏng lẻo
  cầm như cầm cục gạch | xước viền {2} chỗ | sang trọng như đồ hàng mã | mới {2} tuần đã tróc sơn | lỏng khay sim
  nhìn quê quê sao á | trơn {lắm} rớt hoài
Design=: màu {đen} | lấy màu {đen} như hình | máy nặng khoảng 190g | thiết kế vuông | vỏ nhựa
Packaging: đóng gói | đóng hàng | khâu đóng gói | hộp đựng | gói hàng | bọc hàng
Packaging+: gói {rất} cẩn thận | gói kỹ {lắm} | bọc {2} lớp chống sốc | hộp còn nguyên seal | quấn kín mít tháo muốn xỉu
  hộp nguyên vẹn không móp | đầy đủ phụ kiện trong hộp | chèn mút cẩn thận | fullbox | có tem niêm phong đàng hoàng
  bọc xốp kín từng góc | hộp đẹp làm quà được luôn
Packaging-: hộp móp méo | đóng gói sơ sài {lắm} | không có lớp chống sốc nào | hộp rách một góc | seal bị bóc
  thiếu củ sạc trong hộp | gói có mỗi cái bao nilon | hộp dơ như lượm ngoài đường | gói kỹ dữ mỗi cái túi mỏng
  bị rạch băng keo | thiếu phụ kiện | hộp ướt nhẹp
Packaging=: trong hộp có cáp và que chọc sim | hộp gồm máy sạc cáp | hộp carton thường | hộp hơi cấn | không kèm củ sạc
Price: giá | giá cả | giá tiền | mức giá | giá bán | chuyện giá cả
Price+: giá {rất} rẻ | giá mềm {lắm} | săn sale được {3tr} | đáng đồng tiền | đáng tiền {lắm} | trong tầm giá thì vô đối
  giá hạt dẻ | {3tr} mà được vậy là hời | ngon bổ rẻ | áp mã xong còn {3tr} thôi | giá học sinh | không tiếc tiền
Price-: giá cao {lắm} | đắt hơn chỗ khác {2} trăm | không đáng tiền | mua xong hôm sau giảm giá | phí tiền {lắm}
  {3tr} cho cái này là chát | giá trên trời | hét giá | rẻ quá rẻ mua xong tiếc {3tr} | mua hớ rồi | mất toi {3tr}
  khuyến mãi ảo nâng giá lên rồi giảm
Price=: giá {3tr} | mình mua {3tr} | giá ngang các chỗ khác | tiền nào của nấy | giá không rẻ không đắt
Shop_Service: shop | thái độ shop | nhân viên | tư vấn | dịch vụ | bảo hành
Shop_Service+: {shop} tư vấn nhiệt tình | {nhân viên} {rất} dễ thương | {shop} trả lời tin nhắn nhanh | {shop} uy tín
  hỏi gì cũng trả lời | được tặng thêm ốp với cường lực | đổi máy lỗi không hỏi nhiều | {shop} làm ăn có tâm
  cài đặt giúp từ đầu tới cuối | bảo hành nhanh gọn | {shop} gọi lại xin lỗi và bù mã | phục vụ chu đáo
Shop_Service-: {shop} không trả lời tin nhắn | {nhân viên} thái độ lồi lõm | hỏi bảo hành thì im re | sai màu
  tư vấn một đằng bán một nẻo | đổi trả lằng nhằng | {shop} làm ăn gian dối | nhiệt tình lúc chưa trả tiền
  gọi mãi không ai nghe máy | {nhân viên} nói chuyện cộc lốc | hứa tặng ốp mà không thấy đâu | lừa đảo
Shop_Service=: bảo hành 12 tháng | {shop} rep hơi lâu nhưng có rep | chưa cần tới bảo hành | {shop} ở quận {2}
  {nhân viên} tư vấn sơ sơ
Shipping: giao hàng | ship | vận chuyển | khâu giao hàng | shipper | bên ship
Shipping+: giao hàng {rất} nhanh | giao nhanh {lắm} | hôm trước đặt hôm sau có | {shipper} {rất} thân thiện | đúng hẹn
  ship hỏa tốc | nhận hàng sớm hơn dự kiến {2} ngày | {shipper} gọi điện trước khi tới | giao tận tay | nhanh gọn lẹ
  đặt tối sáng nhận | mưa mà vẫn giao
Shipping-: giao hàng chậm {lắm} | đợi {20} ngày mới nhận được | {shipper} thái độ {tệ} | giao sai địa chỉ | chậm như rùa
  {shipper} quăng hàng trước cửa | hẹn {2} ngày thành {20} ngày | giao nhanh thật đặt từ {tuần} trước hôm nay mới tới
  gọi mãi không ai nghe máy | báo giao thành công mà chưa nhận được gì | phí ship cắt cổ | ngóng hàng mỏi cả cổ
Shipping=: giao {2} ngày | ship hơi lâu do ở tỉnh | giao trong giờ hành chính | {shipper} để ở bảo vệ | phí ship {20}k
General: sản phẩm | máy | hàng | chất lượng | tổng thể | con này
General+: {rất} hài lòng | sản phẩm {rất} {tốt} | mọi thứ đều {tốt} | quá ưng ý | hàng chính hãng | sẽ ủng hộ tiếp
  nên mua {nhé} | tuyệt vời | ngon lành cành đào | không còn gì để chê | đáng tiền {lắm} | {mẹ} mình dùng khen hoài
General-: thất vọng {lắm} | sản phẩm {tệ} {lắm} | hàng giả | không nên mua {nhé} | mua về hối hận | phí tiền {lắm}
  mới {2} {tuần} đã hỏng | một sao cũng là nhiều | cạn lời | tuyệt vời mua về làm cục chặn giấy | mất niềm tin | lừa đảo
General=: mới dùng chưa biết sao | để dùng thêm rồi đánh giá | nói chung là {thường} | hàng giống mô tả | cũng được
Others=: ai biết chỗ dán cường lực chỉ mình với | sim 4g phải ra nhà mạng đổi | tìm thêm tai nghe bluetooth
  mua thêm thẻ nhớ ở chỗ khác | có ai chuyển dữ liệu từ ios sang chưa | wifi nhà mình chập chờn | ốp mình đặt riêng
any+: {} {rất} {tốt} | {} {tốt} {lắm} | {} thì khỏi bàn | {} không chê vào đâu được | thích nhất là {} | {} không hề tệ
  ưng cái {} {lắm} | {} ăn đứt máy cũ | {} ok {nhé} | khen {} | ai bảo {} dở chứ mình thấy {tốt} | {} ổn
any-: {} {tệ} {lắm} | {} quá {tệ} | {} không {tốt} như quảng cáo | {} chẳng ra gì | chê mỗi {} | bực nhất là {}
  {} thua xa máy cũ | {} mà {tốt} thì đã cho 5 sao | tưởng {} {tốt} ai ngờ {tệ} | {} quá là hài | {} {thường} | {} tạm
any=: {} {thường} | {} không {tốt} cũng không {tệ} | {} chưa kiểm tra kỹ | {} giống mô tả | {} ổn | {} tạm
leads: {} thì | về {} thì | {}: | {} | nói về {} thì
fillers: mình mua cho {mẹ} | mới nhận hàng hôm qua | dùng được {2} {tuần} rồi | đánh giá để nhận xu | cảm ơn {shop}
  lần đầu mua online | mình hay đọc đánh giá trước khi mua | ai phân vân thì tham khảo | mình ở tỉnh
  mình không rành công nghệ | hàng nhận ngày {20} tháng {2} | hồi trước dùng hãng khác | mong là bền | quà cho {mẹ}
  nhà có {2} người dùng hãng này | đọc hết rồi hãy quyết định {nhé} | trời mưa hoài chán | vừa đi làm về viết luôn
decoys: máy cũ của mình chai pin nên đổi | con cũ lag quá nên mới mua | máy trước bể màn hình | hộp cũ mình vứt rồi
  {mẹ} mình không quan tâm camera | lúc mua cũng lo giao chậm | tư vấn giúp mình nên lấy màu nào | dạo này giá xăng tăng
"""
PHRASES = {name: tuple(map(str.strip, text.replace("\n", "|").split("|")))
           for name, text in re.findall(r"^(\w+[+=-]?): (.*(?:\n  .*)*)", _PHRASES, re.MULTILINE)}  # fmt: skip
MARKS = {"Positive": "+", "Negative": "-", "Neutral": "="}


def _words(text: str) -> dict[str, list[str]]:
    """Parse entries `name=word/word`; an empty word inserts nothing."""
    return {name: words.split("/") for name, _, words in (entry.partition("=") for entry in re.split(r"[|\n]", text))}


WORDS = _words("""rất=rất/cực/siêu/khá/quá/vô cùng/|lắm=lắm/quá/ghê/luôn/dã man/vô cùng//|2=2/3/4/5/6/8|20=10/15/20/30
tốt=tốt/ổn/ngon/ok/được/xịn/tuyệt vời/chất lượng|tệ=tệ/kém/chán/dở/thất vọng/chưa ổn/không ổn/bực mình|nhé=nhé/nha/ạ/
thường=bình thường/tạm được/tạm ổn/cũng được/trung bình/không có gì đặc biệt|shop=shop/shop/cửa hàng/bên bán
nhân viên=nhân viên/bạn tư vấn/anh kỹ thuật/chị bán hàng|shipper=shipper/anh giao hàng/bên vận chuyển|tuần=tuần/tháng
mẹ=mẹ/ba/vợ/chồng/con gái/em trai/bà ngoại/bạn gái|game=liên quân/pubg/free fire/game nặng|đen=đen/trắng/xanh rêu/tím
facebook=facebook/tiktok/youtube/zalo|3tr=2tr/3tr5/4 củ/5 triệu/290k/4990k""")
EMOTICONS = _words("""Positive=:))/:)/^^/❤️/👍/😍|Negative=:(/:((/😡/😭/👎/:)|Neutral=:v/^^/:)/🤔/😅/:((""")
SHORT_FORMS = _words("""không=k/ko/hok/khum|được=đc/dc/đk|vậy=z/v|rồi=r/rùi|mọi người=mn|mình=mk/m|sản phẩm=sp|ok=oke
nhân viên=nv|điện thoại=đt/dt|cũng=cx/cug|bình thường=bth|với=vs|biết=bít|quá=wá|gì=j|người=ng|giao hàng=ship|nhưng=nhg
màn hình=mh|hài lòng=hl|bảo hành=bh|chất lượng=cl|hàng=hàg|sạc=xạc|đẹp=đẹt""")
_SHORT = re.compile(rf"\b({'|'.join(sorted(SHORT_FORMS, key=len, reverse=True))})\b", re.IGNORECASE)


@dataclass(frozen=True)
class Review:
    text: str
    labels: Labels  # as annotated, with errors
    truth: Labels  # without errors


def embedded_reviews(config: EmbeddedReviewsConfig, cache: Path) -> Path:
    """Return the folder with train.csv, validation.csv and test.csv; generate it in the cache on first use.

    Raises:
        UserError: the cache folder cannot be written.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # the data depend on this file
    folder = cache / f"reviews-{config.rows}-{config.seed}-{source}"
    files = [f"{split}.csv" for split in SPLITS]
    return made_once(folder, files, lambda work: generate(work, config.rows, config.seed), "data.cache")


def generate(folder: Path, rows: int, seed: int) -> None:
    """Write `rows` reviews (80% train, 10% validation, 10% test), with a column `data` and one column per aspect."""
    train, validation = rows * 8 // 10, rows // 10
    for split, count in zip(SPLITS, (train, validation, rows - train - validation), strict=True):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["data", *ASPECTS])
            for review in reviews(split, count, seed):
                writer.writerow([review.text, *(review.labels.get(aspect, "") for aspect in ASPECTS)])


def reviews(split: str, count: int, seed: int, clean: bool = False) -> Iterator[Review]:
    """Generate `count` reviews of a split. clean: the same content without the writers' style and typos."""
    content, habits, annotator = (random.Random(f"{seed} {split} {kind}") for kind in range(3))  # noqa: S311
    for _ in range(count):
        mood, truth = _pick(content, MOODS), Labels()
        for _ in range(_pick(content, ASPECTS_SAID)):
            aspect = _pick(content, {name: weight for name, weight in ASPECT_IN.items() if name not in truth})
            likely = dict(zip(SENTIMENTS, SENTIMENT_IN[mood], strict=True))
            truth[aspect] = "Neutral" if aspect == "Others" else _pick(content, likely)
        sentences = _sentences(content, truth)
        text = ". ".join(sentences) if clean else _type(habits, sentences, mood)
        yield Review(text, _annotate(annotator, truth), truth)


def _pick(draw: random.Random, weights: Mapping[T, float]) -> T:
    return draw.choices(list(weights), list(weights.values()))[0]


def _sentences(draw: random.Random, truth: Labels) -> list[str]:
    """Sentences about every aspect, and filler sentences; not yet capitalised and without final punctuation."""
    sentences, before = list[str](), ""
    for aspect, sentiment in truth.items():
        for _ in range(_pick(draw, TIMES_SAID)):
            clause = _clause(draw, aspect, MARKS[sentiment])
            if sentences and draw.random() < 0.55 and clause not in sentences[-1]:
                sentences[-1] += draw.choice(AND if sentiment == before else BUT) + clause
            else:
                sentences.append(clause)
            before = sentiment
    for _ in range(max(_pick(draw, FILLERS_SAID), not truth)):
        filler = _fill(draw, draw.choice(PHRASES["decoys" if draw.random() < 0.08 else "fillers"]))
        sentences.insert(draw.randrange(len(sentences) + 1), filler)
    return sentences


def _clause(draw: random.Random, aspect: str, mark: str) -> str:
    """A phrase about the aspect, or a general phrase with a noun of the aspect."""
    phrase, nouns = draw.choice(PHRASES[aspect + mark]), PHRASES.get(aspect, ())
    if nouns and draw.random() < 0.25:
        phrase = draw.choice(PHRASES["any" + mark])
    elif nouns and draw.random() < 0.6 and not any(noun in phrase for noun in nouns):
        phrase = f"{draw.choice(PHRASES['leads'])} {phrase}"
    return _fill(draw, phrase.replace("{}", draw.choice(nouns)) if nouns else phrase)


def _fill(draw: random.Random, phrase: str) -> str:
    return " ".join(re.sub(r"\{(.+?)\}", lambda slot: draw.choice(WORDS[slot[1]]), phrase).split())


def _type(draw: random.Random, sentences: list[str], mood: str) -> str:
    """Join the sentences to a text in the style of one writer."""
    capital, shortened, mistyped = draw.random() < 0.55, _pick(draw, SHORTENED), _pick(draw, MISTYPED)
    text = _pick(draw, BREAKS).join(sentence.capitalize() if capital else sentence for sentence in sentences)
    text += _pick(draw, ENDS)

    def rewrite(words: str | re.Pattern[str], share: float, change: Callable[[str], str]) -> str:
        return re.sub(words, lambda word: change(word[0]) if draw.random() < share else word[0], text)

    if shortened:
        text = rewrite(_SHORT, shortened, lambda word: draw.choice(SHORT_FORMS[word.lower()]))
    if mistyped:
        text = rewrite(r"[^\W\d_]{3,}", mistyped, lambda word: _typo(draw, word))
    if draw.random() < 0.08:
        text = without_tones(text)
    if draw.random() < 0.25:
        kind = mood if draw.random() < 0.8 else draw.choice(SENTIMENTS)
        text += " " + draw.choice(EMOTICONS[kind]) * draw.choice((1, 1, 1, 2))
    return unicodedata.normalize("NFD" if draw.random() < 0.04 else "NFC", text)


def _typo(draw: random.Random, word: str) -> str:
    """Drop or double a letter, or swap it with the next one."""
    index = draw.randrange(1, len(word) - 1)
    letter, following = word[index], word[index + 1]
    typo = draw.choice((following, letter + letter + following, following + letter))
    return word[:index] + typo + word[index + 2 :]


def without_tones(text: str) -> str:
    """Remove Vietnamese diacritics: đẹp lắm -> dep lam."""
    letters = unicodedata.normalize("NFD", text.replace("đ", "d").replace("Đ", "D"))
    return "".join(letter for letter in letters if not "\u0300" <= letter <= "\u036f")


def _annotate(draw: random.Random, truth: Labels) -> Labels:
    labels = Labels()
    for aspect, sentiment in truth.items():
        if draw.random() >= LOST:
            others = [name for name in SENTIMENTS if name != sentiment and aspect != "Others"]
            labels[aspect] = draw.choice(others) if others and draw.random() < CONFUSED else sentiment
    if draw.random() < SPURIOUS:
        labels[draw.choice([name for name in ASPECTS[:-1] if name not in truth])] = draw.choice(SENTIMENTS)
    return labels
