"""What the writers of the embedded reviews say, and how they write it. Data only; `embedded.py` puts it together.

Phrases are separated by bars. A word in braces is a slot: it stands for one of several, and is named after the first.
Some phrases stand under two sentiments or two aspects on purpose: there people disagree too. Under Negative, some
praise and mean the contrary.
"""


def _list(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for line in text.strip().splitlines() for phrase in line.split("|") if phrase.strip())


def _lists(texts: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: _list(text) for name, text in texts.items()}


SLOTS = {
    name: tuple(word.strip() for word in words.split("|"))  # an empty word leaves the slot out
    for name, words in {
        "máy": "máy | máy | em nó | em này | con này | điện thoại | con máy này | chiếc này",
        "rất": "rất | rất | cực | cực kỳ | siêu | khá | quá | vô cùng | thật sự | |",
        "lắm": "lắm | lắm | quá | ghê | thật | luôn | dã man | kinh khủng | vô cùng | | |",
        "hơi": "hơi | hơi | khá | quá | rất | có phần |",
        "tốt": "tốt | tốt | ổn | ngon | ok | được | xịn | ổn áp | tuyệt vời | đỉnh | chất lượng | hài lòng",
        "tệ": "tệ | tệ | kém | chán | dở | tồi | thất vọng | chưa ổn | ẩu | không ổn | chán đời | bực mình",
        "thường": "bình thường | tạm được | tạm ổn | cũng được | vừa đủ | trung bình | không có gì đặc biệt | tạm",
        "nhé": "nhé | nha | ạ | nhá | nè | đó | |",
        "shop": "shop | shop | cửa hàng | người bán | bên bán",
        "nhân viên": "nhân viên | bạn nhân viên | bạn tư vấn | mấy bạn nhân viên | anh kỹ thuật | chị bán hàng",
        "shipper": "shipper | shipper | anh giao hàng | bạn giao hàng | bên vận chuyển",
        "mẹ": "mẹ | ba | vợ | chồng | con gái | con trai | em trai | chị gái | bà ngoại | ông nội | bạn gái",
        "game": "liên quân | pubg | free fire | genshin | tốc chiến | game nặng | game | roblox | fo4",
        "facebook": "facebook | facebook | tiktok | youtube | zalo | web | báo",
        "chậm": "chậm | lâu | trễ",
        "2": "2 | 3 | 4 | 5 | 6 | 7 | 8 | 10",
        "20": "10 | 15 | 20 | 25 | 30 | 40 | 50 | 60 | 70",
        "3tr": "2tr | 3tr | 3tr5 | 2 triệu rưỡi | 4 củ | 5 triệu | 1tr9 | 6tr2 | 7 triệu | 9tr | 290k | 4990k",
        "tuần": "ngày | tuần | tháng | hôm",
        "đen": "đen | trắng | xanh | xanh rêu | tím | hồng | vàng | bạc | xám",
    }.items()
}

NOUNS = _lists({
    "Battery": "pin | pin | pin máy | thời lượng pin | cục pin | viên pin | khoản pin | pin với sạc",
    "Camera": "camera | cam | ảnh chụp | chụp hình | camera trước | cam sau | khoản chụp ảnh | quay video",
    "Performance": "hiệu năng | cấu hình | con chip | tốc độ máy | chơi game | khoản đa nhiệm | độ mượt | xử lý",
    "Display": "màn hình | màn | màn hình máy | độ sáng màn hình | cảm ứng | độ nét của màn | hiển thị",
    "Design": "thiết kế | ngoại hình | kiểu dáng | mẫu mã | màu máy | vỏ máy | lớp hoàn thiện | mặt lưng",
    "Packaging": "đóng gói | đóng hàng | khâu đóng gói | hộp đựng | gói hàng | bọc hàng | hộp máy",
    "Price": "giá | giá cả | giá tiền | mức giá | giá bán | chuyện giá cả",
    "Shop_Service": "shop | thái độ shop | nhân viên | tư vấn | dịch vụ | chăm sóc khách | bảo hành | hậu mãi",
    "Shipping": "giao hàng | ship | vận chuyển | khâu giao hàng | shipper | thời gian giao | bên ship",
    "General": "sản phẩm | máy | hàng | chất lượng | tổng thể | nói chung máy | điện thoại | con này",
})  # fmt: skip

ABOUT_ANY = _lists({  # {} = a noun of the aspect
    "Positive": """
        {} {rất} {tốt} | {} {tốt} {lắm} | {} {tốt} | {} thì khỏi bàn | {} không chê vào đâu được | thích nhất là {}
        {} {tốt} hơn mình nghĩ | {} không hề tệ | {} chẳng có gì để chê | ưng cái {} {lắm} | {} trên cả mong đợi
        {} đúng như mong đợi | {} ăn đứt máy cũ | {} chấm 10 điểm | mê {} luôn | {} không có lỗi gì | {} ok {nhé}
        cộng điểm cho {} | {} xứng đáng 5 sao | ai bảo {} dở chứ mình thấy {tốt} | {} đáng khen | điểm cộng là {}
        khen {} | {} tạm ổn | {} ổn""",
    "Negative": """
        {} {hơi} {tệ} | {} {tệ} {lắm} | {} quá {tệ} | {} không {tốt} lắm | {} không {tốt} như quảng cáo
        {} chẳng ra gì | chê mỗi {} | {} cần cải thiện | {} làm mình thất vọng | {} chưa được như mong đợi
        trừ điểm {} | {} thua xa máy cũ | giá mà {} {tốt} hơn | {} mà {tốt} thì đã cho 5 sao
        {} {tốt} đâu không thấy | bực nhất là {} | {} có vấn đề | ghét nhất là {} | {} không đáng khen
        tưởng {} {tốt} ai ngờ {tệ} | {} không được {tốt} | {} quá là hài | {} thì thôi khỏi nói | {} tạm
        {} bình thường""",
    "Neutral": """
        {} {thường} | {} ở mức {thường} | {} không {tốt} cũng không {tệ} | {} cũng thường thôi | {} chưa kiểm tra kỹ
        {} dùng thêm mới biết | {} tầm trung | {} giống mô tả | {} chấp nhận được | {} tạm ổn | {} ổn | {} tạm
        {} bình thường | {} chưa có gì để nói | {} như bao máy khác""",
})  # fmt: skip

ABOUT_BOTH = _lists({  # {0} and {1} = nouns of two aspects that share a sentiment
    "Positive": """
        {0} với {1} đều {tốt} | {0} và {1} {rất} {tốt} | cả {0} lẫn {1} đều {tốt} | {0}, {1} {tốt} hết
        {0} và {1} khỏi chê | hài lòng cả {0} lẫn {1} | {0} {tốt} {1} cũng {tốt}""",
    "Negative": """
        {0} với {1} đều {tệ} | {0} và {1} {hơi} {tệ} | cả {0} lẫn {1} đều không {tốt} | {0}, {1} {tệ} hết
        {0} và {1} không được {tốt} | chê cả {0} lẫn {1} | {0} đã {tệ} {1} còn {tệ} hơn""",
    "Neutral": """
        {0} với {1} {thường} | {0} và {1} đều {thường} | {0}, {1} cũng vậy thôi | {0} {1} như mô tả""",
})  # fmt: skip

LEADS = ("{} thì ", "về {} thì ", "{}: ", "{} ", "nói về {} thì ", "còn {} thì ")

PHRASES = {
    aspect: _lists(texts)
    for aspect, texts in {
        "Battery": {
            "Positive": """
                pin {rất} trâu | pin trâu {lắm} | dùng cả ngày chưa hết pin | pin xài {2} ngày mới phải sạc
                sạc {rất} nhanh | cắm {20} phút là đầy | sáng sạc một lần tới khuya vẫn còn {20}%
                để qua đêm chỉ tụt 1% | dung lượng lớn xài thả ga | đi làm khỏi cần mang sạc dự phòng
                chơi {game} {2} tiếng mới hết {20}% | lâu lắm mới phải cắm sạc một lần | sạc nhanh vèo cái đã đầy
                pin bền không ngờ | chẳng lo hết pin giữa đường | pin không chai sau {2} tháng
                onscreen hơn {2} tiếng | sạc không nóng mà lại nhanh""",
            "Negative": """
                pin tụt {rất} nhanh | pin yếu {lắm} | ngày sạc {2} lần | mới sạc xong đã tụt còn {20}%
                sạc {2} tiếng chưa đầy | pin trâu ghê sạc {2} lần một ngày | vừa lướt {facebook} tí đã báo đỏ
                đi đâu cũng phải ôm cục sạc theo | để không cũng hao pin | pin bị phồng sau {2} tuần
                pin ảo {20}% là sập nguồn | sạc không vào | nóng ran lúc cắm sạc
                chưa hết buổi sáng đã phải tìm ổ điện | củ sạc kèm theo bị hỏng | pin chai hẳn rồi
                quảng cáo pin 5000 mà dùng như 2000 | nóng như hòn than""",
            "Neutral": """
                pin dùng vừa đủ một ngày | pin 5000mah | pin như máy cũ | chưa test pin kỹ | sạc mất hơn 1 tiếng
                pin ngày sạc 1 lần | pin chưa thấy tụt nhiều chưa dám nói trước | sạc type c {20}w""",
        },
        "Camera": {
            "Positive": """
                chụp ảnh {rất} nét | camera chụp đẹp {lắm} | cam xịn {lắm} | selfie {rất} ảo
                ảnh trong trẻo màu tự nhiên | quay phim chống rung {tốt} | chụp đêm vẫn sáng rõ | sống ảo thì hết ý
                zoom {2}x vẫn rõ | lấy nét nhanh | up ảnh lên mạng ai cũng khen | chụp xóa phông đẹp
                chụp ngược sáng vẫn ra gì và này | bắt nét chuẩn | ảnh ra không cần chỉnh app | quay 4k mịn
                góc rộng lấy được cả nhà""",
            "Negative": """
                chụp ảnh mờ {lắm} | cam vỡ nét | chụp đêm tối như mực | ảnh bị nhòe hết | camera trước bị ố
                quay video rung lắc | 64mp mà thua cái máy cũ 13mp | chụp như máy ảnh đồ chơi
                ảnh ám vàng nhìn như bị bệnh | zoom lên toàn hạt | camera xịn tới mức không nhận ra mặt mình
                lấy nét mãi không xong | selfie mặt bệt như đắp bột | mở cam lên là đen thui
                chụp thiếu sáng {hơi} {tệ} | màu ảnh nhợt nhạt | chụp chậm con chạy mất tiêu rồi""",
            "Neutral": """
                camera {20}mp | chụp đủ dùng | cam chụp giấy tờ thôi nên không quan tâm
                chưa chụp nhiều nên chưa biết | ảnh ban ngày thì được ban đêm thì chịu | camera ngang máy cùng tầm
                có 3 camera sau | ảnh chụp cũng được""",
        },
        "Performance": {
            "Positive": """
                máy chạy {rất} mượt | mượt {lắm} | chơi {game} max setting không giật | mở app nhanh | đa nhiệm {tốt}
                chip mạnh | lướt {facebook} êm ru | chiến {game} cả buổi máy vẫn mát | chưa thấy lag lần nào
                không giật không đơ | nhanh gọn lẹ | ram {2}gb mở chục app không load lại
                cày {game} {20} fps ổn định | vuốt chạm tức thì | bấm cái lên ngay | xử lý {rất} nhanh
                khởi động chưa tới {20} giây""",
            "Negative": """
                máy lag {lắm} | giật lag liên tục | chơi {game} là đơ | chậm như rùa | hay bị văng app
                máy nóng ran khi chơi {game} | mở {facebook} cũng phải chờ | tự khởi động lại {2} lần một ngày
                mượt dữ vuốt cái đứng hình {2} giây | nóng như hòn than | gõ phím chữ ra sau | ram {2}gb cho có
                treo máy hoài | bộ nhớ báo đầy dù chưa cài gì | đơ toàn tập | nghe gọi bị rớt sóng hoài
                bấm mãi không ăn | chậm {lắm}""",
            "Neutral": """
                máy chạy {thường} | đủ lướt {facebook} nghe gọi | chơi {game} mức thấp thì được | chip đời trước
                ram {2}gb | lâu lâu khựng tí không sao | chưa chơi game nên không biết mạnh yếu""",
        },
        "Display": {
            "Positive": """
                màn hình {rất} nét | màn đẹp {lắm} | màu sắc tươi sống động | màn 120hz vuốt sướng tay
                xem phim đã mắt | ra nắng vẫn nhìn rõ | màn to dễ đọc | amoled có khác đen sâu
                viền mỏng coi {facebook} {rất} đã | cảm ứng nhạy {lắm} | chữ to rõ hợp người lớn tuổi
                nhìn lâu không mỏi mắt | hiển thị trong veo | nét căng | màn cong coi mê | không có điểm chết nào
                đẹp {lắm}""",
            "Negative": """
                màn hình bị sọc | màn ám vàng | màn tối {lắm} ra nắng khỏi thấy gì | màn bị hở sáng
                có điểm chết ngay giữa | cảm ứng loạn | liệt cảm ứng một góc | màn dễ trầy {lắm}
                màn rỗ như tivi đời cũ | mới rớt nhẹ đã bể màn | nhìn màn hình như nhìn qua sương
                lưu ảnh sau {2} tuần | nhấp nháy liên tục | màn hình đẹp đấy có 2 sọc xanh | chạm chỗ này ăn chỗ kia
                nhìn mỏi mắt {lắm} | viền dày cộp""",
            "Neutral": """
                màn hình 6.{2} inch | màn lcd thường | màn 60hz thôi | độ sáng vừa phải | màn đủ xem {facebook}
                màn hình hơi to so với tay mình nhưng quen thì được | màu màn hơi dịu""",
        },
        "Design": {
            "Positive": """
                máy đẹp {lắm} | cầm {rất} sang | mỏng nhẹ | màu {đen} đẹp xuất sắc | cầm vừa tay | nhìn sang chảnh
                đẹp {lắm} | thiết kế {rất} tinh tế | hoàn thiện chắc chắn | mặt lưng không bám vân tay
                cầm lên là mê | gọn gàng bỏ túi vừa | màu {đen} ngoài đời đẹp hơn hình | ai thấy cũng hỏi mua ở đâu
                nhìn như máy chục triệu | các cạnh bo mềm""",
            "Negative": """
                máy dày và nặng | vỏ nhựa nhìn rẻ tiền | trầy xước sẵn | màu {đen} giao khác hình | cầm cấn tay {lắm}
                nút nguồn lỏng lẻo | viền hở nhét được tờ giấy | cụm cam lồi kênh máy | cầm như cầm cục gạch
                xước viền {2} chỗ | sang trọng như đồ hàng mã | mặt lưng bám vân tay nhìn dơ
                mới {2} tuần đã tróc sơn | lỏng khay sim | nhìn quê quê sao á | kiểu này 10 năm trước rồi
                trơn {lắm} rớt hoài""",
            "Neutral": """
                màu {đen} | lấy màu {đen} như hình | máy nặng khoảng 190g | thiết kế vuông | vỏ nhựa
                kiểu dáng quen thuộc | hơi nặng nhưng mình quen rồi""",
        },
        "Packaging": {
            "Positive": """
                đóng gói {rất} cẩn thận | gói kỹ {lắm} | bọc {2} lớp chống sốc | hộp còn nguyên seal
                hộp nguyên vẹn không móp | gói hàng chắc chắn | quấn kín mít tháo muốn xỉu
                đầy đủ phụ kiện trong hộp | chèn mút cẩn thận | fullbox | có tem niêm phong đàng hoàng
                mở hộp ra thơm mùi mới | bọc xốp kín từng góc | hộp đẹp làm quà được luôn""",
            "Negative": """
                hộp móp méo | đóng gói sơ sài {lắm} | không có lớp chống sốc nào | hộp rách một góc | seal bị bóc
                thiếu củ sạc trong hộp | gói có mỗi cái bao nilon | mở ra thiếu cáp | hộp dơ như lượm ngoài đường
                gói kỹ dữ mỗi cái túi mỏng | hộp không đúng máy | bị rạch băng keo | tem niêm phong rách
                thiếu phụ kiện | đựng hộp giày luôn mới sợ | hộp ướt nhẹp""",
            "Neutral": """
                trong hộp có cáp và que chọc sim | hộp gồm máy sạc cáp | hộp carton thường
                không có chống sốc nhưng máy không sao | hộp hơi cấn nhẹ | hộp không kèm củ sạc""",
        },
        "Price": {
            "Positive": """
                giá {rất} rẻ | giá mềm {lắm} | rẻ hơn ngoài tiệm {2} trăm | săn sale được {3tr} | đáng đồng tiền
                đáng tiền {lắm} | trong tầm giá thì vô đối | giá hạt dẻ | {3tr} mà được vậy là hời | ngon bổ rẻ
                áp mã xong còn {3tr} thôi | giá học sinh sinh viên | tiền nào của nấy thì này quá lời
                không tiếc tiền | giá này kiếm đâu ra""",
            "Negative": """
                giá cao {lắm} | đắt hơn chỗ khác {2} trăm | không đáng tiền | mua xong hôm sau giảm giá
                phí tiền {lắm} | {3tr} cho cái này là chát | tiền nào của nấy | giá trên trời
                thêm tí tiền mua con khác ngon hơn | hét giá | rẻ quá rẻ mua xong tiếc {3tr} | mất toi {3tr}
                mã giảm giá không áp được | mua hớ rồi | giá chát | khuyến mãi ảo nâng giá lên rồi giảm""",
            "Neutral": """
                giá {3tr} | mình mua {3tr} | giá ngang các chỗ khác | tiền nào của nấy | giá vậy thì chịu
                giá niêm yết {3tr} | giá không rẻ không đắt""",
        },
        "Shop_Service": {
            "Positive": """
                {shop} tư vấn nhiệt tình | {nhân viên} {rất} dễ thương | {shop} trả lời tin nhắn nhanh
                {shop} uy tín | hỏi gì cũng trả lời | {nhân viên} hỗ trợ tận tình | được tặng thêm ốp với cường lực
                đổi máy lỗi không hỏi nhiều | {shop} làm ăn có tâm | cài đặt giúp từ đầu tới cuối
                {nhân viên} vui vẻ lịch sự | bảo hành nhanh gọn | {shop} gọi lại xin lỗi và bù mã
                nhắn lúc 11 giờ đêm vẫn có người rep | phục vụ chu đáo""",
            "Negative": """
                {shop} không trả lời tin nhắn | {nhân viên} thái độ lồi lõm | hỏi bảo hành thì im re
                {shop} giao sai màu | tư vấn một đằng bán một nẻo | đổi trả lằng nhằng | {shop} làm ăn gian dối
                nhắn {2} ngày không ai rep | chăm sóc khách nhiệt tình lúc chưa trả tiền | gọi mãi không ai nghe máy
                hẹn {2} lần không giải quyết | {nhân viên} nói chuyện cộc lốc | bảo hành đùn đẩy
                {shop} bán hàng trưng bày | xem xong không thèm trả lời | hứa tặng ốp mà không thấy đâu | lừa đảo""",
            "Neutral": """
                bảo hành 12 tháng | {shop} rep hơi lâu nhưng có rep | chưa cần tới bảo hành | {shop} ở quận {2}
                {nhân viên} tư vấn sơ sơ | {shop} có gọi xác nhận đơn""",
        },
        "Shipping": {
            "Positive": """
                giao hàng {rất} nhanh | giao nhanh {lắm} | hôm trước đặt hôm sau có | {shipper} {rất} thân thiện
                ship hỏa tốc | nhận hàng sớm hơn dự kiến {2} ngày | {shipper} gọi điện trước khi tới | giao tận tay
                đúng hẹn | nhanh gọn lẹ | {shipper} cho kiểm tra hàng | đặt tối sáng nhận | mưa mà vẫn giao
                nhanh {lắm} | miễn phí vận chuyển""",
            "Negative": """
                giao hàng {chậm} {lắm} | đợi {20} ngày mới nhận được | {shipper} thái độ {tệ} | giao sai địa chỉ
                hàng nằm kho cả {2} ngày | {shipper} quăng hàng trước cửa | hẹn {2} ngày thành {20} ngày
                chậm như rùa | giao nhanh thật đặt từ {tuần} trước hôm nay mới tới | không cho kiểm hàng
                gọi mãi không ai nghe máy | báo giao thành công mà chưa nhận được gì | giao {hơi} {chậm}
                phí ship cắt cổ | ngóng hàng mỏi cả cổ | chậm {lắm}""",
            "Neutral": """
                giao {2} ngày | hàng tới đúng khoảng thời gian dự kiến | ship hơi lâu do ở tỉnh
                giao trong giờ hành chính | {shipper} để ở bảo vệ | giao bình thường | phí ship {20}k""",
        },
        "General": {
            "Positive": """
                {rất} hài lòng | sản phẩm {rất} {tốt} | mọi thứ đều {tốt} | quá ưng ý | hàng chính hãng
                sẽ ủng hộ tiếp | nên mua {nhé} | đáng mua | tuyệt vời | mọi người nên mua | {máy} dùng {tốt}
                ngon lành cành đào | 10 điểm | không còn gì để chê | mua lần {2} rồi vẫn ưng | đúng mô tả dùng thích
                đáng tiền {lắm} | đẹp {lắm} | xịn sò | chất lượng {tốt} | {mẹ} mình dùng khen hoài""",
            "Negative": """
                thất vọng {lắm} | sản phẩm {hơi} {tệ} | hàng giả | không nên mua {nhé} | mua về hối hận
                đừng mua phí tiền {lắm} | mới {2} {tuần} đã hỏng | hàng lỗi | máy dựng | dùng được {2} {tuần} là trả
                một sao cũng là nhiều | vứt | cạn lời | tuyệt vời mua về làm cục chặn giấy | chán chẳng buồn nói
                mất niềm tin | nói chung là {tệ} | {mẹ} mình dùng {2} {tuần} bỏ xó | lừa đảo""",
            "Neutral": """
                {máy} dùng {thường} | mới dùng chưa biết sao | để dùng thêm rồi đánh giá | nói chung là {thường}
                hàng giống mô tả | tạm hài lòng | cũng được | dùng thử {2} {tuần} đã""",
        },
        "Others": {
            "Neutral": """
                ai biết chỗ dán cường lực chỉ mình với | sim 4g phải ra nhà mạng đổi
                mình đang tìm thêm cái tai nghe bluetooth | đồng hồ mua chung đơn thì chưa mở
                mua thêm thẻ nhớ ở chỗ khác | có ai chuyển dữ liệu từ ios sang chưa
                thẻ căn cước đăng ký sim hơi rườm rà | ốp với dây đeo mình đặt riêng
                wifi nhà mình dạo này chập chờn | cái cân điện tử mua kèm tính sau | app ngân hàng đòi xác thực lại
                loa bluetooth đặt cùng vẫn đang chờ""",
        },
    }.items()
}

FILLERS = _list("""
    mình mua cho {mẹ} | mới nhận hàng hôm qua | dùng được {2} {tuần} rồi | đánh giá để nhận xu
    hình mang tính chất nhận xu | cảm ơn {shop} | chúc {shop} buôn may bán đắt | lần đầu mua online
    đây là lần thứ {2} mình mua | mua dịp sinh nhật {mẹ} | mình hay đọc đánh giá trước khi mua
    hôm nay mới rảnh viết vài dòng | ai phân vân thì tham khảo | vậy thôi | tuần sau mình quay lại đánh giá tiếp
    mình ở tỉnh | nói thật lòng {nhé} | theo cảm nhận cá nhân | mình không rành công nghệ | mua làm máy phụ chạy việc
    nhà có {2} người dùng hãng này | hàng nhận ngày {20} tháng {2} | có gì mình cập nhật sau
    đặt lúc nửa đêm vì mất ngủ | để xem sao | trời mưa hoài chán | quà cho {mẹ} nhân dịp lễ
    hồi trước dùng hãng khác | cho mình góp ý chút | ai cùng cảm nhận không | đợt này công ty thưởng nên lên đời
    mình là khách quen | mua chung với đồng nghiệp | vừa đi làm về viết luôn | chưa biết nói gì hơn | mong là bền
    bé nhà mình giành hoài | đọc hết rồi hãy quyết định {nhé}
    """)  # fmt: skip

DECOYS = _list("""
    máy cũ của mình chai pin nên đổi | trước giờ mình chuyên chụp bằng máy ảnh | con cũ lag quá nên mới mua
    máy trước bể màn hình | {mẹ} mình không quan tâm camera | ai cần pin trâu thì xem con khác
    ngoài đường kẹt xe nên về trễ | đang chờ giảm giá đợt sau | đọc bình luận thấy nhiều bạn chê màn hình
    mình chỉ nghe gọi không chơi game | hộp cũ mình vứt rồi | chưa biết ship về quê mất bao lâu
    lúc mua cũng lo giao chậm | thấy người ta khen cam nên tò mò | dạo này giá xăng tăng
    tư vấn giúp mình nên lấy màu nào
    """)  # fmt: skip

FIELDS = _list("""
    màu sắc: {đen} | nhóm màu: {đen} | dung lượng: 128gb | phiên bản: {2}gb/128gb | phân loại: máy {đen}
    tình trạng: mới | tính năng nổi bật: chưa rõ
    """)

SAME = (", ", ", ", ", ", " và ", ", lại còn ", ", thêm nữa ", " mà ", " + ", ", rồi ", ", với lại ")
TURN = (" nhưng ", " nhưng ", " nhưng mà ", ", tuy nhiên ", ", còn ", " mà ", ", ")
TURN_TO = {
    "Positive": (", được cái ", ", bù lại ", " nhưng bù lại "),
    "Negative": (", mỗi tội ", ", có điều ", ", chỉ tội ", ", tiếc là ", ", khổ nỗi "),
    "Neutral": (", còn lại ", ", riêng "),
}
CONTRASTS = ("tuy {0} nhưng {1}", "mặc dù {0} nhưng {1}", "tuy {0} nhưng bù lại {1}", "ngoài chuyện {0} thì {1}")
EMOTICONS = {
    "Positive": (":))", "=))", "^^", ":3", "❤️", "👍", "😍", "🥰", "🤣", ":)", "<3", "👏"),
    "Negative": (":(", ":((", "😡", "😤", "😭", "👎", "=))", ":v", "-_-", "😢", "🙂", ":)"),
    "Neutral": (":v", "^^", ":)", "🤔", ":3", "😅", "=))", ":(("),
}

TEENCODE = {
    word: tuple(forms.split())
    for word, forms in {
        "không": "k ko ko k kh hok hem khum", "được": "đc dc đc đk", "vậy": "z v dz", "rồi": "r rùi r",
        "mọi người": "mn",
        "mình": "mk mik m", "bạn": "b bn", "sản phẩm": "sp", "nhân viên": "nv", "điện thoại": "đt dt", "cũng": "cx cug",
        "bình thường": "bth bt", "với": "vs zới", "biết": "bít bik", "quá": "wá qá", "gì": "j", "người": "ng ngừi",
        "nhiều": "nhìu", "thôi": "thui", "luôn": "lun", "giờ": "h", "giao hàng": "ship", "màn hình": "mh",
        "camera": "cam",
        "tin nhắn": "ib tn", "trả lời": "rep", "thích": "thik", "ok": "oke okie oki okela", "anh": "a", "em": "e",
        "chị": "c", "trong": "trog", "khách hàng": "kh", "cửa hàng": "ch shop", "nhưng": "nhg nhưg", "bảo hành": "bh",
        "chất lượng": "cl", "nhé": "nhá nhoa", "hàng": "hàg", "tháng": "th", "triệu": "tr củ", "như thế nào": "ntn",
        "facebook": "fb face", "youtube": "ytb", "liên quân": "lq", "hài lòng": "hl", "dùng": "dùg", "chưa": "chx",
    }.items()
}  # fmt: skip
MISSPELT = {
    "xài": "sài", "sạc": "xạc", "trả": "chả", "giật": "dật", "rẻ": "rẽ", "kỹ": "kĩ", "lỗi": "lổi", "nữa": "nửa",
    "chụp": "trụp", "dở": "dỡ", "hỗ": "hổ", "sẽ": "sẻ", "cẩn": "cẫn", "mượt": "mược", "giao": "dao", "trâu": "châu",
    "màn": "màng", "xước": "sước", "nhanh": "nhah", "hỏa": "hoả", "xóa": "xoá", "chậm": "trậm", "chắc": "trắc",
    "tệ": "tệk", "đẹp": "đẹt", "thất": "thấc", "nhạy": "nhậy", "ổn": "ỗn",
}  # fmt: skip
